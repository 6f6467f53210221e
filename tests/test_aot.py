"""aot as a user meets it."""

import json
import subprocess
import sys

import jax
import pytest
from commands import ONE_DEVICE, ROOT, TINY, assert_fails, assert_works
from PIL import Image

from speedit_jax.testing.vae_weights import write_vae

FEATURES = ["--config.data.features=f", "--config.regularizer.align=0.5", "--config.regularizer.align_target=features"]
MISTAKES = {
    "no config": (["--topology=v5e:2x2"], ["--config is missing"]),
    "no topology": (TINY[:1], ["--topology is missing"]),
    "classes": ([*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1"], ["--num_classes is missing"]),
    "classes of data that are opened": (
        [*TINY[:1], "--topology=v5e:2x2", "--num_classes=5"],
        ["--num_classes goes with --image"],
    ),
    "text of data that are opened": ([*TINY[:1], "--topology=v5e:2x2", "--text_shape=8,16"], ["--text_shape goes with --image"]),
    "classes and text": (
        [*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=5", "--text_shape=8,16"],
        ["--num_classes=5 and --text_shape", "leave one out"],
    ),
    "a directory for numbers": (
        [*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=5", "--out=tests"],
        ["cannot write to", "tests", "it is a directory"],
    ),
    "features": (
        [*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=0", "--features_shape=4,4"],
        ["--features_shape=4,4: give H,W,F"],
    ),
    "features that are not opened": (
        [*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=0", *FEATURES],
        ["--features_shape is missing"],
    ),
    "text that is not opened": (
        [*TINY[:1], "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=0", "--config.data.text=t"],
        ["--text_shape is missing"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(run, case):
    flags, words = MISTAKES[case]
    assert_fails(run("aot", *flags), *words)


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
def test_a_product_without_a_triton_kernel_is_cublas(run):
    """The gradient of the text's keys and values, at these sizes, as XLA compiles for users."""
    pytest.importorskip("jax_cuda12_plugin")
    flags = ["--config=configs/imagenet.py:DiT-XL/2", "--topology=h100x8", "--image_shape=32,32,4", "--text_shape=120,4096"]
    command = [sys.executable, "-m", "speedit_jax.aot", *flags, "--config.model.depth=2"]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all products are cuBLAS's here" in done.stdout and "fits" in done.stdout


@pytest.mark.slow
def test_its_flops_are_those_of_the_step(run, tmp_path):
    """With a route it has fewer than three forward passes."""
    pytest.importorskip("libtpu")
    flags = ["--config=configs/base.py:DiT-tiny/2", "--topology=v5e:2x2", "--image_shape=8,8,1", "--num_classes=2"]
    flags += ["--config.tokens.start=1", "--config.tokens.tail=1", f"--out={tmp_path / 'aot.json'}"]
    counts = []
    for method in ("none", "route"):
        result = run("aot", *flags, f"--config.tokens.method={method}")
        assert_works(result)
        counts.append(json.loads((tmp_path / "aot.json").read_text())["model_flops_per_device"])
    assert "0.76 of the FLOPs" in result.out and round(counts[1] / counts[0], 2) == 0.76


@pytest.mark.slow
def test_what_does_not_fit_says_so(run):
    pytest.importorskip("libtpu")
    flags = ["--config=configs/imagenet.py:DiT-XL/2", "--topology=v5e:2x2", "--image_shape=32,32,4", "--num_classes=1000"]
    result = run("aot", *flags, "--config.model.remat=none", "--config.training.batch_size=256")
    assert result.code == 1 and "does not fit" in result.out and "Traceback" not in result.err


@pytest.mark.slow
def test_the_autoencoder_is_counted(run, tmp_path):
    """Whether the data are images or --image_shape says what is drawn of them."""
    pytest.importorskip("libtpu")
    vae = write_vae(tmp_path / "vae", "four")
    for i in range(2):
        (tmp_path / "images" / "ab"[i]).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "ab"[i] / "x.png")
    flags = ["--config=configs/base.py:DiT-tiny/2", "--topology=v5e:2x2", f"--out={tmp_path / 'aot.json'}"]
    flags += [f"--config.data.vae={vae}", "--config.sampling.clip=False", "--config.training.batch_size=16"]
    data = [f"--config.data.source=folder:{tmp_path / 'images'}", "--config.data.height=64", "--config.data.width=64"]
    records = []
    for shape in (data, ["--image_shape=32,32,4", "--num_classes=2"]):
        result = run("aot", *flags, *shape)
        assert_works(result)
        assert "(32, 32, 4)" in result.out and "before each step the encoder of" in result.out
        records.append(json.loads((tmp_path / "aot.json").read_text()))
    images, drawn = records
    assert images["encoder"] == drawn["encoder"] and images["bytes_per_device"] == drawn["bytes_per_device"]
    of_step, of_encoder = (facts["bytes_per_device"] for facts in (images, images["encoder"]))
    assert of_encoder["arguments"] >= 4 * 64 * 64 * 3 * 4  # four images a device
    assert images["encoder"]["flops_per_device"] > 0
    assert images["bytes_needed"] == max(of_step["total"] + of_encoder["arguments"], of_encoder["total"] + of_step["arguments"])
