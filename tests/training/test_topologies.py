"""The step of train.py, compiled from shapes alone, what is read off it, and accelerators that are not there."""

import re

import pytest

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.errors import UserError
from speedit_jax.sampling.sampler import Settings, lower_sampler
from speedit_jax.training import topologies, traffic
from speedit_jax.training.assembly import assemble

SMALL = {"width": 64, "depth": 2, "heads": 2}


def lowered(what, devices=None, name="DiT-tiny/2", image=(8, 8, 4), model=SMALL, batch=16, **mesh):
    config = get_config(name)
    config.model.update(model)
    config.training.batch_size = 256 if devices is not None and len(devices) > 16 else batch
    config.mesh.update(mesh)
    parts = assemble(config, Description(image, tuple(map(str, range(10)))), sharding.make_mesh(config.mesh, devices))
    if what == "train":
        return parts.lower_step()
    settings = Settings.from_config(config.sampling, parts.model)
    return lower_sampler(parts.model, parts.diffusion, settings, parts.mesh, config.training.batch_size)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_measures_what_is_compiled(what):
    facts = topologies.measure(lowered(what, data=2, fsdp=2, tensor=2).compile())
    size = facts["bytes_per_device"]
    assert size["arguments"] > 0 and size["temporaries"] > 0 and facts["flops_per_device"] > 0
    if what == "train":
        # The state is given away and comes back in place.
        assert size["reused"] > 0.9 * size["arguments"]
        assert facts["collectives"]["all-reduce"]["bytes"] > 0
    assert set(facts["collectives"]) <= set(traffic.COLLECTIVES)


@pytest.mark.slow
def test_sharded_parameters_take_less_of_each_device():
    arguments = [
        topologies.measure(lowered("train", data=-1, fsdp=fsdp).compile())["bytes_per_device"]["arguments"] for fsdp in (1, 8)
    ]
    assert arguments[1] < 0.5 * arguments[0]


@pytest.mark.parametrize("topology, module", [("v5e:2x2", "libtpu"), ("h100", "jax_cuda12_plugin")])
def test_without_the_compiler(monkeypatch, topology, module):
    found = topologies.importlib.util.find_spec
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(UserError, match=r"compiler is missing: pip install -e '\.\[\w+"):
        topologies.devices(topology)


@pytest.mark.parametrize("topology", ["h200", "h100x", "h100x0", "h100x8x8"])
def test_unknown_machines(topology):
    with pytest.raises(UserError, match=rf"--topology={topology}"):
        topologies.devices(topology)


def test_gpu_targets_are_what_xla_reads():
    """Every field is known to XLA: the text parses, and the device says what it said."""
    pytest.importorskip("jax_cuda12_plugin")
    for name, gpu in topologies.GPUS.items():
        devices, allowed = topologies.devices(f"{name}x2")
        assert len(devices) == 2 and allowed < gpu["memory"]
        assert devices[0].device_kind == gpu["name"] and devices[0].core_count == gpu["cores"]


# Compilers that are not part of the test extra: docs/training.md, "Will it fit?".
COMPILERS = {"v5e:2x2": "libtpu", "v5e:2x4": "libtpu", "v5e:16x16": "libtpu", "h100x4": "jax_cuda12_plugin"}
WIDE = (40, 48, 4)
TOKENS = (480, 512)  # of that, and padded for a kernel: numbers that nothing else in the model has


@pytest.mark.slow
@pytest.mark.parametrize("topology", COMPILERS)
@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_no_token_travels(topology, name):
    """Parameters are gathered, gradients reduced; tokens stay on the device that has the image, or its heads."""
    pytest.importorskip(COMPILERS[topology])
    devices, _ = topologies.devices(topology)
    model = {"width": 192, "depth": 4, "heads": 4}
    text = lowered("train", devices, name, WIDE, model, data=-1, fsdp=2, tensor=2).compile().as_text()
    gathered = [dims for kind, arrays in traffic.collectives(text) if kind == "all-gather" for _, dims in arrays]
    assert gathered, "fsdp gathers parameters"
    # Tokens have an axis of their own or, in the linear layers, one with the batch.
    assert not any(dim % tokens == 0 for dims in gathered for dim in dims for tokens in TOKENS), gathered


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_only_the_gradient_crosses_slices(topology):
    """Of floats, as many bytes for any batch, and in sums: of the gradient's shards and of the metrics.

    With tensor > 1 XLA also moves the conditioning of each image between slices, a few kB.
    """
    pytest.importorskip("libtpu")
    devices, _ = topologies.devices(topology, 2)
    sent = []
    for batch in (16, 32):
        step = lowered("train", devices, batch=batch, data=-1, fsdp=4, slices=2)
        text = step.compile().as_text()
        crossing = [arrays for kind, arrays in traffic.collectives(text) if kind == traffic.BETWEEN_SLICES]
        sent.append(sorted(array for arrays in crossing for array in arrays if array[0] in ("bf16", "f32")))
        sums = [line for line in text.splitlines() if " send(" in line and re.search(r"= \((bf16|f32)", line)]
        assert sums and all('_xla_megascale_reduce_operation="SUM"' in line for line in sums)
        # All other collectives join devices of one slice: the program's groups number these.
        assert not re.search(r"replica_groups=\{[^}]*\b[4-7]\b", text)
    assert sent[0] == sent[1]


@pytest.mark.slow
def test_projections_write_the_layout_of_the_kernel():
    """On a TPU GLA wants features before tokens; XLA has the projections write that, and copies nothing to or from it."""
    pytest.importorskip("libtpu")
    devices, _ = topologies.devices("v5e:2x2")
    model = {"width": 192, "depth": 4, "heads": 4, "remat": "full"}
    text = lowered("train", devices, "DiG-tiny/2", (32, 64, 4), model, data=-1).compile().as_text()  # 512 tokens, whole chunks
    kernels = re.findall(r"= .*\[4,\d+,512\].* custom-call\(.*tpu_custom_call", text)
    assert len(kernels) >= 4
    assert not re.findall(r"= \w+\[4,\d+,512\]\S* (?:copy|transpose)\(.*", text)
