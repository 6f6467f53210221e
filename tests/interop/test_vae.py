"""Files of a VAE: names, layouts, older files, the hub, and the line for each thing that can be wrong."""

import hashlib
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from errors import assert_one_line
from safetensors.numpy import save_file

from speedit_jax.interop.vae import (
    CONFIG,
    WEIGHTS,
    checksum,
    copy,
    find_vae,
    read_config,
    read_params,
    tensor_name,
    weights_files,
)

# A convolution, attention and a norm, ours: path -> shape.
LIKE = {
    "encoder": {
        "down_blocks_0_downsamplers_0_conv": {"kernel": (3, 3, 4, 6), "bias": (6,)},
        "mid_block": {
            "attentions_0": {
                "group_norm": {"scale": (6,), "bias": (6,)},
                **{name: {"kernel": (6, 6), "bias": (6,)} for name in ("to_q", "to_k", "to_v", "to_out_0")},
            }
        },
    },
    "quant_conv": {"kernel": (1, 1, 6, 8), "bias": (8,)},
}
LIKE = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), LIKE, is_leaf=lambda x: isinstance(x, tuple))
DOWN = "encoder.down_blocks.0.downsamplers.0.conv"
ATTENTION = "encoder.mid_block.attentions.0"
LAYERS = {
    DOWN: (6, 4, 3, 3),
    f"{ATTENTION}.group_norm": (6,),
    **{f"{ATTENTION}.{name}": (6, 6) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    "quant_conv": (8, 6, 1, 1),
}


def tensors():
    rng = np.random.default_rng(0)
    arrays = {f"{name}.{p}": s for name, shape in LAYERS.items() for p, s in (("weight", shape), ("bias", shape[:1]))}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in arrays.items()}


def older(state, as_convolution):
    """The names of the published sd-vae-ft files; the oldest have 1x1 convolutions."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for name, array in state.items():
        for new, old in names.items():
            if new in name:
                name = name.replace(new, old)
                array = array[:, :, None, None] if as_convolution and array.ndim == 2 else array
        result[name] = array
    return result


def write(directory, state, config="{}"):
    (directory / CONFIG).write_text(config)
    save_file(state, directory / WEIGHTS)
    return directory


def test_names_and_layouts(tmp_path):
    state = tensors()
    params = read_params(write(tmp_path, state), LIKE)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), LIKE)
    conv = params["encoder"]["down_blocks_0_downsamplers_0_conv"]
    assert conv["kernel"][2, 1, 3, 5] == state[f"{DOWN}.weight"][5, 3, 2, 1]
    np.testing.assert_array_equal(conv["bias"], state[f"{DOWN}.bias"])
    attention = params["encoder"]["mid_block"]["attentions_0"]
    np.testing.assert_array_equal(attention["to_out_0"]["kernel"], state[f"{ATTENTION}.to_out.0.weight"].T)
    np.testing.assert_array_equal(attention["group_norm"]["scale"], state[f"{ATTENTION}.group_norm.weight"])
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_tensor_name():
    path = ("decoder", "up_blocks_2_resnets_10", "conv_shortcut", "kernel")
    assert tensor_name(path) == "decoder.up_blocks.2.resnets.10.conv_shortcut.weight"


@pytest.mark.parametrize("as_convolution", [False, True])
def test_older_files(tmp_path, as_convolution):
    state = older(tensors(), as_convolution)
    assert f"{ATTENTION}.proj_attn.weight" in state
    (tmp_path / "new").mkdir()
    expected = read_params(write(tmp_path / "new", tensors()), LIKE)
    jax.tree.map(np.testing.assert_array_equal, read_params(write(tmp_path, state), LIKE), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    state = {name: array.astype(dtype) for name, array in tensors().items()}
    bias = read_params(write(tmp_path, state), LIKE)["quant_conv"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, state["quant_conv.bias"].astype(np.float32))


def test_tensors_that_do_not_fit(tmp_path):
    def read(change):
        state = tensors()
        change(state)
        return lambda: read_params(write(tmp_path, state), LIKE)

    path = str(tmp_path / WEIGHTS)
    assert_one_line(read(lambda s: s.pop("quant_conv.bias")), path, "lacks quant_conv.bias", CONFIG)
    assert_one_line(read(lambda s: s.update(spare=np.zeros(1))), path, "unknown spare")
    assert_one_line(read(lambda s: s.update({"quant_conv.bias": np.zeros(7)})), "quant_conv.bias (7,) instead of (8,)")
    wrong = np.zeros((6, 4, 5, 5))
    assert_one_line(read(lambda s: s.update({f"{DOWN}.weight": wrong})), f"{DOWN}.weight (6, 4, 5, 5) instead of (6, 4, 3, 3)")
    many = {f"spare.{i}": np.zeros(1) for i in range(9)}
    assert_one_line(read(lambda s: s.update(many)), "spare.0, spare.1, spare.2 and 6 more")
    # All kinds of fault are in one line.
    assert_one_line(read(lambda s: s.update(many) or s.pop("quant_conv.bias")), "lacks quant_conv.bias", "unknown spare.0")


def test_unreadable_files(tmp_path):
    (tmp_path / CONFIG).write_text("{'a': 1}")
    (tmp_path / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_one_line(lambda: read_config(tmp_path), str(tmp_path / CONFIG), "not JSON")
    assert_one_line(lambda: read_params(tmp_path, LIKE), str(tmp_path / WEIGHTS), "safetensors")
    (tmp_path / CONFIG).write_text("[1]")
    assert_one_line(lambda: read_config(tmp_path), str(tmp_path / CONFIG))


def test_directories(tmp_path):
    assert_one_line(lambda: find_vae(str(tmp_path)), repr(str(tmp_path)), f"no {CONFIG} and no {WEIGHTS}")
    (tmp_path / CONFIG).write_text(json.dumps({"latent_channels": 4}))
    assert_one_line(lambda: find_vae(str(tmp_path)), f"no {WEIGHTS}")
    (tmp_path / WEIGHTS).touch()
    assert find_vae(str(tmp_path)) == tmp_path
    assert read_config(tmp_path) == {"latent_channels": 4}
    for where in (f"{tmp_path}/nowhere", "nowhere", "./no/where", "../nowhere", ""):
        assert_one_line(lambda where=where: find_vae(where), repr(where), CONFIG, WEIGHTS)


SINGLE = "diffusion_pytorch_model"


def save_torch(state, path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)


def save_shards(directory, state, suffix, index, save):
    """Every other tensor in one of two files."""
    names = sorted(state)
    for i in range(2):
        save({name: state[name] for name in names[i::2]}, directory / f"{SINGLE}-0000{i + 1}-of-00002.{suffix}")
    weight_map = {name: f"{SINGLE}-0000{i % 2 + 1}-of-00002.{suffix}" for i, name in enumerate(names)}
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halved(state):
    return {name: array.astype(np.float16) for name, array in state.items()}


# What diffusers' save_pretrained writes, with and without safe_serialization, variant="fp16" and max_shard_size.
LAYOUTS = {
    "safetensors": lambda d, s: save_file(s, d / f"{SINGLE}.safetensors"),
    "bin": lambda d, s: save_torch(s, d / f"{SINGLE}.bin"),
    "fp16": lambda d, s: save_file(halved(s), d / f"{SINGLE}.fp16.safetensors"),
    "fp16 bin": lambda d, s: save_torch(halved(s), d / f"{SINGLE}.fp16.bin"),
    "shards": lambda d, s: save_shards(d, s, "safetensors", f"{SINGLE}.safetensors.index.json", save_file),
    "bin shards": lambda d, s: save_shards(d, s, "bin", f"{SINGLE}.bin.index.json", save_torch),
    "fp16 shards": lambda d, s: save_shards(d, halved(s), "safetensors", f"{SINGLE}.safetensors.index.fp16.json", save_file),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    """Each is read, of a pipeline too, and copied as diffusers' usual two files."""
    place, copied = tmp_path / "pipeline" / "vae", tmp_path / "copy"
    place.mkdir(parents=True)
    copied.mkdir()
    (place / CONFIG).write_text("{}")
    LAYOUTS[layout](place, tensors())
    state = tensors() if "fp16" not in layout else {name: a.astype(np.float32) for name, a in halved(tensors()).items()}
    (tmp_path / "expected").mkdir()
    expected = read_params(write(tmp_path / "expected", state), LIKE)
    for where in (place, place.parent):
        assert find_vae(str(where)) == place
    jax.tree.map(np.testing.assert_array_equal, read_params(place, LIKE), expected)
    copy(place, copied)
    assert find_vae(str(copied)) == copied
    jax.tree.map(np.testing.assert_array_equal, read_params(copied, LIKE), expected)
    first = checksum(place)
    with weights_files(place)[-1].open("ab") as file:
        file.write(b"0")
    assert len(first) == 64 and checksum(place) != first


def test_full_precision_comes_first(tmp_path):
    write(tmp_path, tensors())
    save_file(halved(tensors()), tmp_path / f"{SINGLE}.fp16.safetensors")
    assert checksum(tmp_path) == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.fp16.safetensors", "mine.ckpt"])
def test_a_file_beside_its_config(tmp_path, name):
    path = tmp_path / name
    (save_file if "safetensors" in name else save_torch)(tensors(), path)
    assert_one_line(lambda: find_vae(str(path)), repr(str(path)), "is one file", "directory", CONFIG, "save_pretrained")
    (tmp_path / CONFIG).write_text("{}")
    assert find_vae(str(path)) == path
    assert read_config(path) == {}
    np.testing.assert_array_equal(read_params(path, LIKE)["quant_conv"]["bias"], tensors()["quant_conv.bias"])


def test_an_index_that_does_not_fit_its_files(tmp_path):
    LAYOUTS["shards"](tmp_path, tensors())
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / f"{SINGLE}-00002-of-00002.safetensors").unlink()
    assert_one_line(lambda: read_params(tmp_path, LIKE), f"{SINGLE}-00002-of-00002.safetensors", "index.json")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    assert_one_line(lambda: read_params(tmp_path, LIKE), "index.json", "weight_map")


def test_numbers_that_are_not_finite(tmp_path):
    for value in (np.nan, np.inf):
        state = tensors()
        state["quant_conv.bias"][3] = value
        assert_one_line(lambda state=state: read_params(write(tmp_path, state), LIKE), "quant_conv.bias is not finite")


@pytest.mark.parametrize("name", ["first_stage_model.encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"])
def test_original_names(tmp_path, name):
    write(tmp_path, {name: np.zeros(3, np.float32)})
    assert_one_line(lambda: read_params(tmp_path, LIKE), "original Stable Diffusion", "from_single_file")


def test_what_exists_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    """A path of two parts looks like a name on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    (tmp_path / "vaes" / "empty").mkdir(parents=True)
    (tmp_path / "vaes" / "mine.safetensors").touch()
    assert_one_line(lambda: find_vae("vaes/mine.safetensors"), "is one file")
    assert_one_line(lambda: find_vae("vaes/empty"), f"no {CONFIG} and no {WEIGHTS}")


def test_no_download_without_the_hubs_library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    name = "stabilityai/sd-vae-ft-ema"
    assert_one_line(lambda: find_vae(name), name, CONFIG, WEIGHTS, "pip install -e '.[hub]'")
