"""The mesh, the rule table, and who holds which rows of a batch.

PYTHONPATH=tests python -m test_sharding writes the golden table anew.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import MESHES, ONE

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.models.build import build

GOLDEN = Path(__file__).parent / "golden" / "dit_s2.txt"


def dit_s2() -> str:
    """The table of DiT-S/2 for latents of 32 x 32 x 4 and 1000 classes."""
    config = get_config().model
    model = build(config, image_shape=(32, 32, 4), num_classes=1000, learned_variance=True, platform="cpu")
    return sharding.table(model.axes, jax.eval_shape(model.init, jax.random.key(0))) + "\n"


def test_golden_table():
    anew = "PYTHONPATH=tests python -m test_sharding"
    assert dit_s2() == GOLDEN.read_text(), f"if the change is meant, write {GOLDEN.name} anew: {anew}; and review its diff"


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'\nand more"), AssertionError()])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=.*; unset it to use this machine's devices$"):
        sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def test_rules_name_mesh_axes():
    targets = [target for target in sharding.RULES.values() if target is not None]
    assert {axis for t in targets for axis in ([t] if isinstance(t, str) else t)} == set(sharding.AXES)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), P()),
        (("batch", None, None), P(("data", "fsdp"), None, None)),
        (("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
        (("heads", None, "embed"), P("tensor", None, "fsdp")),
    ],
)
def test_spec(names, expected):
    assert sharding.spec(names) == expected


@pytest.mark.parametrize(
    ("names", "both", "axis"),
    [
        (("heads", "mlp"), ("heads", "mlp"), "tensor"),
        (("embed", "layers", "embed"), ("embed", "embed"), "fsdp"),
        (("batch", "embed"), ("batch", "embed"), "fsdp"),
    ],
)
def test_spec_names_both_axes_of_a_collision(names, both, axis):
    with pytest.raises(ValueError, match=f"'{both[0]}' and '{both[1]}' .* both map to '{axis}'"):
        sharding.spec(names)


def test_spec_knows_only_its_names():
    with pytest.raises(KeyError, match="width"):
        sharding.spec(("width",))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 1), (1, 8, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((-1, 2, 4), (1, 2, 4)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_make_mesh(sizes, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    assert mesh.axis_names == sharding.AXES
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    # Under Explicit axes, jax's default, with_sharding_constraint would be an assertion.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_devices(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "mesh.data=0, mesh.fsdp=1, mesh.tensor=1: sizes must be positive"),
        ((-2, 1, 1), "mesh.data=-2, .* sizes must be positive"),
        ((-1, -1, 1), "at most one -1"),
        ((2, 2, 1), "mesh.data=2, mesh.fsdp=2, mesh.tensor=1 does not match 8 devices; set one size to -1"),
        ((16, 1, 1), "does not match 8 devices; set one size to -1"),
        (
            (-1, 3, 1),
            "mesh.data=-1, mesh.fsdp=3, mesh.tensor=1 does not match 8 devices; choose sizes whose product divides that",
        ),
        ((-1, 16, 1), "does not match 8 devices; choose sizes whose product divides that"),
    ],
)
def test_make_mesh_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def test_make_mesh_of_some_devices():
    assert sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:2]).devices.shape == (2, 1, 1)


@dataclasses.dataclass(frozen=True)
class Device:
    """As JAX describes one of several slices, or of several nodes of GPUs, which it calls slices too."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "some kind"


def test_slices_divide_the_data_axis():
    devices = [Device(i, i % 2) for i in range(8)]
    found = sharding._over_slices([4, 2, 1], 2, devices)
    assert found.shape == (4, 2, 1)
    assert [[device.slice_index for device in row.flat] for row in found] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sorted(device.id for device in found.flat) == list(range(8))


def test_nodes_of_gpus_are_one_mesh_unless_the_config_says_more():
    devices = [Device(i, i // 4) for i in range(8)]
    for slices in (None, 1):
        found = sharding._over_slices([1, 2, 4], slices, devices)
        assert [device.id for device in found.flat] == list(range(8))


@pytest.mark.parametrize(
    ("platform", "shape", "slices", "message"),
    [
        ("tpu", [8, 1, 1], 1, "mesh.slices=1, but the 8 devices are of 2; set mesh.slices=2"),
        ("tpu", [8, 1, 1], 4, "mesh.slices=4, but the 8 devices are of 2; set mesh.slices=2"),
        ("gpu", [8, 1, 1], 3, "mesh.slices=3, but the 8 devices are of 2; set mesh.slices=2"),
        ("tpu", [1, 8, 1], None, "mesh.data=1 is not a multiple of mesh.slices=2"),
    ],
)
def test_slices_that_are_not_there(platform, shape, slices, message):
    with pytest.raises(UserError, match=message):
        sharding._over_slices(shape, slices, [Device(i, i // 4, platform) for i in range(8)])


def test_one_slice_is_not_several():
    with pytest.raises(UserError, match=r"mesh.slices=2, but the 8 devices are of 1; set mesh.slices=1"):
        sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "slices": 2})


def test_param_shardings_follow_the_rules():
    mesh = tiny.make_mesh((2, 2, 2))
    axes = {"kernel": ("embed", "mlp"), "bias": (None,)}
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 6), np.float32), "bias": jax.ShapeDtypeStruct((3,), np.float32)}
    assert sharding.param_shardings(mesh, axes, shapes) == {
        "kernel": NamedSharding(mesh, P("fsdp", "tensor")),
        "bias": NamedSharding(mesh, P(None)),
    }


def test_param_shardings_name_what_does_not_divide():
    shapes = {"mlp": {"up": jax.ShapeDtypeStruct((8, 6), np.float32)}}
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide the 6 mlp of parameter mlp/up"):
        sharding.param_shardings(tiny.make_mesh((1, 2, 4)), {"mlp": {"up": ("embed", "mlp")}}, shapes)


@pytest.mark.parametrize("shape", [ONE, *MESHES], ids=str)
def test_rows_round_trip(shape):
    rows_sharding = sharding.batch_sharding(tiny.make_mesh(shape))
    values = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    rows = sharding.local_rows(rows_sharding, 16)
    assert rows.tolist() == list(range(16))
    array = sharding.global_array(rows_sharding, 16, rows, values)
    assert array.sharding == rows_sharding
    assert np.asarray(array).tobytes() == values.tobytes()
    for shard in array.addressable_shards:
        assert shard.data.shape == (16 // (shape[0] * shape[1]), 3)
        np.testing.assert_array_equal(shard.data, values[shard.index])


class OneOfTwoProcesses:
    """What a NamedSharding says where only some of its devices are this process's."""

    def __init__(self, whole: NamedSharding, devices):
        self._whole, self._devices = whole, set(devices)

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self._whole.devices_indices_map(shape).items() if d in self._devices}


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ((8, 1, 1), range(8), range(8, 16)),
        ((2, 2, 2), range(8), range(8, 16)),
        # The processes split the heads, so both hold the same rows.
        ((1, 1, 8), range(16), range(16)),
    ],
    ids=str,
)
def test_rows_of_two_processes(shape, first, second):
    mesh = tiny.make_mesh(shape)
    for devices, rows in zip(np.split(mesh.devices.ravel(), 2), (first, second), strict=True):
        part = OneOfTwoProcesses(sharding.batch_sharding(mesh), devices)
        assert sharding.local_rows(part, 16).tolist() == list(rows)


if __name__ == "__main__":
    GOLDEN.write_text(dit_s2())
