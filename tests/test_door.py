"""A run from Python."""

import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, TINY, assert_works

import speedit_jax
from speedit_jax.errors import UserError


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("door") / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    return workdir


def test_the_same_images_as_the_command(run, trained, tmp_path):
    flags = ["--num_images=10", "--class_labels=3,7,1", "--guidance_scale=2", "--seed=5", "--batch_size=8"]
    assert_works(run("sample", f"--workdir={trained}", f"--out={tmp_path / 'x'}", *flags))
    theirs = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    loaded = speedit_jax.load(trained)
    ours = loaded.sample([3, "7", 1], num_images=10, guidance_scale=2, seed=5, batch_size=8)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape == (10, 8, 8, 1)
    # One device there, eight here: rounding may move a pixel over the border between two levels.
    assert abs(ours - theirs).max() <= 1
    assert (loaded.sample([3], guidance_scale=2, seed=5) == ours[:1]).mean() > 0.95


def test_what_it_holds(trained):
    loaded = speedit_jax.load(str(trained), step=3, weights="raw")
    assert loaded.run.step == 3 and loaded.config.data.source == "digits"
    assert loaded.class_names == [str(digit) for digit in range(10)]
    x = np.zeros((8, 8, 8, 1), np.float32)
    assert loaded.model.apply(loaded.params, x, np.zeros(8, int), np.zeros(8, int)).shape == (8, 8, 8, 2)
    assert loaded.diffusion.schedule.num_steps == 1000


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda workdir: speedit_jax.load(workdir.parent), "no checkpoints"),
        (lambda workdir: speedit_jax.load(workdir, step=4), "no checkpoint of step 4"),
        (lambda workdir: speedit_jax.load(workdir, weights="best"), "unknown --weights=best"),
        (lambda workdir: speedit_jax.load(workdir).sample(["cat"]), "no class 'cat'"),
        (lambda workdir: speedit_jax.load(workdir).sample([10]), "no class '10'"),
        (lambda workdir: speedit_jax.load(workdir).sample(sampler="euler"), "unknown sampler 'euler'"),
        (lambda workdir: speedit_jax.load(workdir).sample("37"), r"labels='37': .* list"),
        (lambda workdir: speedit_jax.load(workdir).sample(3), r"labels=3: .* list"),
        (lambda workdir: speedit_jax.load(workdir, tile=True), "tile=True"),
        (lambda workdir: speedit_jax.load(workdir, text_encoder="words"), "text_encoder=words"),
        (lambda workdir: speedit_jax.load(workdir).sample(sampler="ddpm", eta=0.5), "eta=0.5"),
        (lambda workdir: speedit_jax.load(workdir).sample(num_images=0), "num_images=0: must be at least 1"),
        (lambda workdir: speedit_jax.load(workdir).sample(batch_size=0), "batch_size=0: must be at least 1"),
    ],
)
def test_mistakes(trained, call, words):
    with pytest.raises(UserError, match=words):
        call(trained)


def test_importing_the_package_imports_no_jax():
    code = "import sys, speedit_jax; assert not {'jax', 'numpy'} & set(sys.modules); assert callable(speedit_jax.load)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
