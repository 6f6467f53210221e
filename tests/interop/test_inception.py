"""The weight file of Inception-v3: its kinds, names and layouts, and one line for each thing that can be wrong."""

import jax
import numpy as np
import pytest
from errors import assert_one_line
from safetensors.numpy import save_file

from speedit_jax.interop.inception import NAME, URL, arrange, read_inception, tensor_name

LIKE = {
    "Mixed_5b": {
        "branch1x1": {"conv": {"kernel": (1, 3, 4, 6)}, "bn": {name: (6,) for name in ("scale", "bias", "mean", "var")}},
    },
    "fc": {"kernel": (6, 9)},
}
LIKE = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), LIKE, is_leaf=lambda x: isinstance(x, tuple))
BN = "Mixed_5b.branch1x1.bn"
SHAPES = {
    "Mixed_5b.branch1x1.conv.weight": (6, 4, 1, 3),
    **{f"{BN}.{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")},
    f"{BN}.num_batches_tracked": (),
    "fc.weight": (9, 6),
    "fc.bias": (9,),
}


def tensors():
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def write(path, state):
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    return str(path)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth", "x.pt"])
def test_names_and_layouts(tmp_path, name):
    state = tensors()
    params = arrange(read_inception(write(tmp_path / name, state)), LIKE, name)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), LIKE)
    branch = params["Mixed_5b"]["branch1x1"]
    assert branch["conv"]["kernel"][0, 2, 3, 5] == state["Mixed_5b.branch1x1.conv.weight"][5, 3, 0, 2]
    for ours, theirs in {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}.items():
        np.testing.assert_array_equal(branch["bn"][ours], state[f"{BN}.{theirs}"])
    np.testing.assert_array_equal(params["fc"]["kernel"], state["fc.weight"].T)


def test_tensor_name():
    assert tensor_name(("Conv2d_1a_3x3", "conv", "kernel")) == "Conv2d_1a_3x3.conv.weight"


def test_where_to_get_it(tmp_path):
    assert_one_line(lambda: read_inception(None), URL, NAME)
    assert_one_line(lambda: read_inception(str(tmp_path / "none.pth")), "none.pth", URL)


def test_files_that_are_something_else(tmp_path):
    def read(change):
        state = tensors()
        change(state)
        return lambda: arrange(state, LIKE, "some/where")

    assert_one_line(read(lambda s: s.pop("fc.weight")), "some/where", "missing fc.weight")
    assert_one_line(read(lambda s: s.update(spare=np.zeros(1))), "some/where", "extra spare")
    assert_one_line(read(lambda s: s.update({"fc.weight": np.zeros((8, 6))})), "fc.weight", "(8, 6)", "(9, 6)")
    (tmp_path / "x.bin").touch()
    assert_one_line(lambda: read_inception(str(tmp_path / "x.bin")), "x.bin", "empty")
    (tmp_path / "x.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_one_line(lambda: read_inception(str(tmp_path / "x.npz")), "x.npz", "Git LFS")


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth"])
def test_what_is_not_finite_is_named(tmp_path, name):
    state = tensors()
    state[f"{BN}.running_var"] = np.full_like(state[f"{BN}.running_var"], np.inf)
    assert_one_line(lambda: read_inception(write(tmp_path / name, state)), f"{BN}.running_var is not finite")
