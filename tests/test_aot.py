"""aot: the step of train.py, compiled from shapes alone, and what is read off it."""

import json

import jax
import pytest
from commands import TINY, assert_fails, assert_works

from configs import base
from speedit_jax import aot
from speedit_jax.training import builders, sharding

SMALL = {"name": "DiT-tiny/2", "width": 64, "depth": 2, "heads": 2, "dtype": "float32"}


def lowered(what, **sizes):
    config = base.get_config()
    config.model.update(SMALL)
    config.training.batch_size = 8
    config.mesh.update(sizes)
    mesh = sharding.make_mesh(config.mesh)
    return aot.lower(config, mesh, builders.make_model(config, mesh, (8, 8, 4), 10), what)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_measures_what_is_compiled(what):
    facts = aot.measure(lowered(what, data=2, fsdp=2, tensor=2).compile(), 1.0)
    size = facts["bytes_per_device"]
    assert size["arguments"] > 0 and size["temporaries"] > 0 and facts["flops_per_device"] > 0
    if what == "train":
        # The state is given away and comes back in place.
        assert size["reused"] > 0.9 * size["arguments"]
        assert facts["collectives"]["all-reduce"]["bytes"] > 0
    assert set(facts["collectives"]) <= set(aot.COLLECTIVES)


def test_sharded_parameters_take_less_of_each_device():
    arguments = [
        aot.measure(lowered("train", data=-1, fsdp=fsdp).compile(), 1.0)["bytes_per_device"]["arguments"] for fsdp in (1, 8)
    ]
    assert arguments[1] < 0.5 * arguments[0]


def test_collectives_are_read_off_the_program():
    text = """
      %a = bf16[8,128]{1,0} all-gather(%p), dimensions={0}
      %b = (f32[4]{0}, f32[2,2]{1,0}) all-reduce-start(%x, %y), to_apply=%add
      %c = f32[4]{0} all-reduce-done(%b)
      %d = f32[] all-reduce(%z), to_apply=%add
      %e = f32[16]{0} add(%all-reduce.1, %q)
    """
    assert aot.collectives(text) == {"all-gather": {"count": 1, "bytes": 2048}, "all-reduce": {"count": 2, "bytes": 36}}


MISTAKES = {
    "no config": (["--topology=v5e:2x2"], ["--config is missing"]),
    "no topology": (TINY[:1], ["--topology is missing"]),
    "classes": ([*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1"], ["--num_classes is missing"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(run, case):
    flags, words = MISTAKES[case]
    assert_fails(run("aot", *flags), *words)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aot.UserError, match=r"the TPU compiler is missing: pip install"):
        aot.topology_devices("v5e:2x2")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", ["DiT-S/2", "DiG-S/2"])
def test_compiles_for_tpus_that_are_not_there(run, tmp_path, topology, name):
    pytest.importorskip("libtpu")
    flags = [f"--config=configs/imagenet.py:{name}", f"--topology={topology}", "--image_shape=32,32,4", "--num_classes=1000"]
    result = run("aot", *flags, "--config.training.batch_size=64", f"--out={tmp_path / 'aot.json'}")
    assert_works(result)
    record = json.loads((tmp_path / "aot.json").read_text())
    assert record["fits"] and record["bytes_per_device"]["total"] < 16 * 2**30
    # Each device computes its own images: no token travels.
    assert "all-gather" not in record["collectives"] and jax.__version__ == record["jax"]


@pytest.mark.slow
def test_what_does_not_fit_says_so(run):
    pytest.importorskip("libtpu")
    flags = ["--config=configs/imagenet.py:DiT-XL/2", "--topology=v5e:2x2", "--image_shape=32,32,4", "--num_classes=1000"]
    result = run("aot", *flags, "--config.model.remat=none", "--config.training.batch_size=256")
    assert result.code == 1 and "does not fit" in result.out and "Traceback" not in result.err
