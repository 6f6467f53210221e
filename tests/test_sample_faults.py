"""What sample does with what can go wrong, and with outputs that grow."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works

from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.run import open_run

LARGEST = 2**32 - 1


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("faults") / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    return workdir


@pytest.fixture(scope="module")
def latents(run, tmp_path_factory):
    """A run whose four channels nothing decodes."""
    workdir = tmp_path_factory.mktemp("latents") / "run"
    shape = ["--config.data.source=synthetic", "--config.data.synthetic_size=64", "--config.data.channels=4"]
    assert_works(run("train", *TINY, *shape, "--config.sampling.clip=False", f"--workdir={workdir}"))
    return workdir


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_are_not_wrapped_round(run, trained, tmp_path, seed):
    workdir = f"--workdir={trained}"
    for command in ("sample", "likelihood"):
        assert_fails(run(command, workdir, f"--seed={seed}"), f"--seed={seed}", str(LARGEST))
    images = ["--images=digits", "--reference=digits", "--features=pixels"]
    assert_fails(run("evaluate", *images, f"--seed={seed}"), f"--seed={seed}", str(LARGEST))
    for key in ("seed", "evaluation.seed"):
        result = run("train", *TINY, f"--workdir={tmp_path / 'x'}", f"--config.{key}={seed}")
        assert_fails(result, f"{key}={seed}", "at least 0" if seed < 0 else str(LARGEST))
    assert not (tmp_path / "x").exists()


def test_the_largest_seed_is_one_of_its_own(run, trained, tmp_path):
    images = []
    for seed in (LARGEST, 0):
        assert_works(run("sample", f"--workdir={trained}", f"--seed={seed}", "--num_images=2", f"--out={tmp_path / str(seed)}"))
        images.append(np.load(tmp_path / f"{seed}.npz")["arr_0"])
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize("flags", [[], ["--batch_size=4"], ["--batch_size=5", "--png_files", "--class_labels=random"]], ids=str)
def test_more_images_are_added(run, trained, tmp_path, flags):
    """12 and then 27 are, to the byte, 27 at once; neither 4, 5 nor 16 divides both."""
    flags = [f"--workdir={trained}", *flags]
    for name in ("grown", "once"):
        (tmp_path / name).mkdir()
    grown = ["sample", *flags, f"--out={tmp_path / 'grown' / 'x'}"]
    assert_works(run(*grown, "--num_images=12"))
    twelve = np.load(tmp_path / "grown" / "x.npz")
    first, labels = twelve["arr_0"], twelve["arr_1"]
    result = run(*grown, "--num_images=27")
    assert_works(result)
    kept = {"--batch_size=4": 12, "--batch_size=5": 10}.get(flags[1] if len(flags) > 1 else "", 0)
    assert (f"Resuming: {kept} of 27 images are finished." in result.out) == bool(kept)
    assert_works(run("sample", *flags, "--num_images=27", f"--out={tmp_path / 'once' / 'x'}"))
    assert files(tmp_path / "grown") == files(tmp_path / "once")
    whole = np.load(tmp_path / "grown" / "x.npz")
    np.testing.assert_array_equal(whole["arr_0"][:12], first)
    np.testing.assert_array_equal(whole["arr_1"][:12], labels)


def test_images_are_not_taken_away(run, trained, tmp_path):
    flags = ["sample", f"--workdir={trained}", f"--out={tmp_path / 'x'}"]
    assert_works(run(*flags, "--num_images=5"))
    before = files(tmp_path)
    assert_fails(run(*flags, "--num_images=3"), "5 instead of 3", "take the first 3", "--overwrite")
    assert_fails(run(*flags, "--num_images=8", "--seed=1"), "other settings", "seed was 0, now 1")
    assert files(tmp_path) == before
    assert_works(run(*flags, "--num_images=3", "--overwrite"))
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 3


def test_the_same_weights_as_another_network_are_other_images(run, trained, tmp_path):
    """Two imports of one file have the same bytes, and yet draw other images."""
    assert_works(run("convert", f"--workdir={trained}", f"--to={tmp_path / 'w.safetensors'}"))
    for name, flag in (("one", "heads=2"), ("two", "heads=4")):
        flags = [f"--from={tmp_path / 'w.safetensors'}", f"--workdir={tmp_path / name}", f"--config.model.{flag}"]
        assert_works(run("convert", *flags))
    flags = ["--num_images=2", "--num_steps=2", f"--out={tmp_path / 'x'}"]
    assert_works(run("sample", f"--workdir={tmp_path / 'one'}", *flags))
    told = json.loads((tmp_path / "x.json").read_text())["network"]
    assert told["image_shape"] == [8, 8, 1] and told["model.heads"] == 2 and told["diffusion.prediction"] == "epsilon"
    result = run("sample", f"--workdir={tmp_path / 'two'}", *flags)
    assert_fails(result, "other settings", "network.model.heads was 2, now 4", "--overwrite")


def test_latents_are_no_pictures(run, latents, tmp_path):
    flags = ["sample", f"--workdir={latents}", "--batch_size=4"]
    result = run(*flags, "--num_images=6", f"--out={tmp_path / 'x'}")
    assert_works(result)
    assert "latents, not pictures" in result.out and "--vae=DIR" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.latents.png", "x.npz"]
    with np.load(tmp_path / "x.npz") as file:
        assert sorted(file.files) == ["labels", "latents"]
        drawn = file["latents"]
    assert drawn.dtype == np.float32 and drawn.shape == (6, 8, 8, 4)
    assert np.abs(drawn).max() > 1, "neither clipped nor rounded"
    assert_works(run(*flags, "--num_images=11", f"--out={tmp_path / 'x'}"))
    assert_works(run(*flags, "--num_images=11", f"--out={tmp_path / 'y'}"))
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["latents"][:6], drawn)
    assert_fails(run(*flags, "--png_files", f"--out={tmp_path / 'z'}"), "--png_files", "latents are no pictures", "--vae")
    assert_fails(run(*flags, "--tile", f"--out={tmp_path / 'z'}"), "--tile", "--vae")
    assert_fails(run(*flags, "--clip", f"--out={tmp_path / 'z'}"), "clip=True: this run draws latents")
    images = ["evaluate", f"--images={tmp_path / 'x.npz'}", "--reference=digits", "--features=pixels"]
    assert_fails(run(*images), "no arr_0", "latents")


def spoil(workdir, copy, value):
    """A copy of a run of which one number of the EMA's last bias is `value`."""

    opened = open_run(workdir)
    weights = {name: jax.device_get(opened.restore(name)) for name in ("raw", "ema")}
    opened.checkpoints.close()
    leaf = jax.tree_util.tree_leaves_with_path(weights["ema"])[-1]
    weights["ema"] = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full_like(x, value) if path == leaf[0] else x, weights["ema"]
    )
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    checkpoints = Checkpoints(copy, create=True)
    checkpoints.save_weights(6, weights["raw"], weights["ema"], opened.meta)
    checkpoints.wait()
    checkpoints.close()
    return copy


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(run, trained, tmp_path, value):
    """Infinity, clipped, would be a black picture."""
    broken = spoil(trained, tmp_path / "broken", value)
    out = tmp_path / "out"
    result = run("sample", f"--workdir={broken}", "--num_images=4", f"--out={out / 'x'}")
    assert_fails(result, "weight arrays hold NaN or infinity", "the first is")
    assert not list(out.glob("x.*g")) and not list(out.glob("x.json")) and not list(out.glob("x.npz"))
    assert_fails(run("likelihood", f"--workdir={broken}", "--num_images=2"), "weight arrays hold NaN or infinity")
    assert not (broken / "likelihood.json").exists()
    assert_works(run("sample", f"--workdir={broken}", "--weights=raw", "--num_images=4", f"--out={tmp_path / 'raw'}"))


@pytest.fixture(scope="module")
def diverged(run, tmp_path_factory):
    """(result, workdir) of a training whose weights are finite and so large that nothing computed from them is."""
    workdir = tmp_path_factory.mktemp("diverged") / "run"
    flags = ["--config.optim.learning_rate=1e38", "--config.training.sample_every=3", "--config.evaluation.every=3"]
    result = run("train", *TINY, *flags, f"--workdir={workdir}", "--config.evaluation.num_images=4")
    assert_works(result)
    return result, workdir


def test_pictures_that_are_not_finite(run, diverged, tmp_path):
    result = run("sample", f"--workdir={diverged[1]}", "--num_images=4", f"--out={tmp_path / 'x'}")
    last = dataclasses.replace(result, err=result.err.splitlines()[-1])  # after the bar
    assert_fails(last, "image 0: the sampled values hold NaN or infinity", "guidance scale", "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]


def test_a_grid_that_is_not_finite_does_not_end_training(diverged):
    result, workdir = diverged
    shown = result.out + result.err
    assert "warning: no grid of samples at step 3: image 0" in shown and "warning: no evaluation at step 6: image 0" in shown
    assert not (workdir / "samples").exists()
    assert (workdir / "checkpoints" / "6").is_dir() and "eval_fid" not in (workdir / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--guidance_scale=inf", ["guidance_scale=inf", "finite"]),
        ("--guidance_scale=nan", ["guidance_scale=nan", "finite"]),
        ("--eta=nan", ["eta=nan", "[0, 1]"]),
        ("--guidance_low=nan", ["guidance_low=nan"]),
        ("--guidance_high=inf", ["guidance_high=inf"]),
        ("--guidance_channels=2", ["guidance_channels=2", "0..1"]),
        ("--dtype=float16", ["dtype", "float16", "bfloat16"]),
        ("--tile", ["--tile"]),
    ],
)
def test_flags_that_cannot_be(run, trained, tmp_path, flag, words):
    assert_fails(run("sample", f"--workdir={trained}", flag, f"--out={tmp_path / 'x'}"), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, name, value",
    [("--noclip", "clip", False), ("--dtype=bfloat16", "dtype", "bfloat16"), ("--guidance_channels=1", "guidance_channels", 1)],
)
def test_flags_are_recorded_and_count(run, trained, latents, tmp_path, flag, name, value):
    workdir = latents if name == "guidance_channels" else trained
    drawn = []
    for out, flags in (("plain", []), ("flag", [flag])):
        assert_works(run("sample", f"--workdir={workdir}", "--num_images=4", *flags, f"--out={tmp_path / out}"))
        with np.load(tmp_path / f"{out}.npz") as file:
            drawn.append(file[file.files[0]])
    assert json.loads((tmp_path / "flag.json").read_text())[name] == value
    assert (drawn[0] != drawn[1]).any()
