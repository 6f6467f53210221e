"""Runs with data.mask as a user meets them: started from a plain run, gone on with, and filling pictures."""

import json

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works
from PIL import Image
from test_finetune import saved

import speedit_jax
from speedit_jax.sampling.images import write_png

MASK = "--config.data.mask=mixed"
# So large that six steps show what the network is told.
FAST = ["--config.optim.learning_rate=0.02", "--config.optim.schedule=constant", "--config.training.log_every=1"]


@pytest.fixture(scope="module")
def masked(run, trained, tmp_path_factory):
    """(a run with masks that started from the plain one, what it said)."""
    workdir = tmp_path_factory.mktemp("masked") / "run"
    flags = [MASK, *FAST, f"--config.init_from={trained}", "--config.training.sample_every=6", "--config.sampling.grid_images=6"]
    result = run("train", *TINY, *flags, f"--workdir={workdir}")
    assert_works(result)
    return workdir, result.out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a.png, b.png, which differs from it in the right half only, and mask.png, which fills that."""
    directory, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    b[:, :4] = a[:, :4]
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:, 4:] = 255
    for name, pixels in {"a": a, "b": b, "mask": mask}.items():
        write_png(directory / f"{name}.png", pixels)
    return directory, a, mask[..., 0]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_first_loss_is_that_of_the_plain_run_to_the_bit(run, trained, masked, tmp_path):
    workdir, out = masked
    assert "masks: the layer hint starts anew, from zero" in out
    assert "masks      mixed: " in out and "nothing of 25% of the images" in out
    flags = [*FAST, f"--config.init_from={trained}", "--config.training.num_steps=3"]
    assert_works(run("train", *TINY, *flags, f"--workdir={tmp_path / 'plain'}"))
    plain, told = losses(tmp_path / "plain"), losses(workdir)
    assert plain[0] == told[0] and plain[2] != told[2]


def test_a_run_that_goes_on_ends_in_the_same_bits(run, trained, masked, tmp_path):
    flags = [*TINY, MASK, *FAST, f"--config.init_from={trained}", f"--workdir={tmp_path / 'run'}"]
    assert_works(run("train", *flags, "--config.training.num_steps=3"))
    again = run("train", *flags)
    assert_works(again)
    assert "Resuming from the checkpoint of step 3" in again.out
    for item in ("params", "ema"):
        whole, parts = (saved(workdir, item) for workdir in (masked[0], tmp_path / "run"))
        assert "hint/kernel" in whole and whole.keys() == parts.keys()
        for name, array in whole.items():
            np.testing.assert_array_equal(array, parts[name])
    for flags, words in (
        ([], ["data.mask was 'mixed', now ''", "init_from"]),
        (["--config.data.mask=boxes"], ["data.mask was 'mixed', now 'boxes'", "--continue_with_changes"]),
    ):
        assert_fails(run("train", *TINY, *FAST, *flags, f"--workdir={masked[0]}"), *words)


def test_a_plain_run_may_start_from_it(run, masked, tmp_path):
    result = run("train", *TINY, f"--config.init_from={masked[0]}", f"--workdir={tmp_path / 'run'}")
    assert_works(result)
    assert "masks: the layer hint is left out" in result.out and "hint/kernel" not in saved(tmp_path / "run", "params")


def test_its_grid_shows_pairs(masked):
    """What is told, mid grey where nothing is, and the same pixels in the fill beside it."""
    grid = np.asarray(Image.open(masked[0] / "samples" / "step_0000006.png"))[::6, ::6]
    cells = [grid[9 * row : 9 * row + 8, 9 * column : 9 * column + 8] for row in range(3) for column in range(4)]
    for told, filled in zip(cells[::2], cells[1::2], strict=True):
        np.testing.assert_array_equal(filled[told != 127], told[told != 127])
    assert any((told == 127).any() for told in cells[::2])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--inpaint=projection", "--guidance_scale=2", "--sampler=ddpm"],
        pytest.param(
            ["--inpaint=repaint", "--num_steps=4", "--resample=2", "--jump=2", "--sampler=ddpm"], marks=pytest.mark.slow
        ),
        pytest.param(["--strength=0.7", "--resample=2", "--jump=1"], marks=pytest.mark.slow),
        ["--guide_workdir=TRAINED", "--guidance_scale=2"],
    ],
    ids=str,
)
def test_what_is_kept_stays_and_what_is_hidden_does_not_matter(run, trained, masked, files, tmp_path, flags):
    directory, picture, mask = files
    flags = [flag.replace("TRAINED", str(trained)) for flag in flags]
    drawn = []
    for name in ("a", "b"):
        out = tmp_path / name
        given = [f"--workdir={masked[0]}", f"--image={directory / name}.png", f"--mask={directory / 'mask.png'}", *flags]
        assert_works(run("sample", *given, f"--out={out}", "--num_images=4", "--batch_size=4"))
        drawn.append(np.load(f"{out}.npz")["arr_0"])
    assert (drawn[0][:, mask == 0] == picture[mask == 0]).all()
    if "--strength=0.7" not in flags:
        np.testing.assert_array_equal(drawn[0], drawn[1])
    known = json.loads((tmp_path / "a.json").read_text())["known"]
    assert known["method"] == next((flag[10:] for flag in flags if flag.startswith("--inpaint")), "network")


def test_it_uses_what_it_is_told(masked, files):
    """The fill of another picture is another; without a picture the network is the plain one of the same weights."""
    _, picture, mask = files
    loaded = speedit_jax.load(masked[0])
    fills = [loaded.sample([3], image=image, mask=mask == 255, num_images=4) for image in (picture, 255 - picture)]
    assert (fills[0][:, mask == 255] != fills[1][:, mask == 255]).any()
    drawn = loaded.sample([3], num_images=4)
    whole = loaded.sample([3], image=picture, mask=np.ones((8, 8), bool), num_images=4)
    np.testing.assert_array_equal(drawn, whole)
    x, t, y = np.zeros((2, 8, 8, 1), np.float32), np.array([9, 999]), np.array([3, 10])
    assert np.isfinite(jax.jit(loaded.model.apply)(loaded.params, x, t, y)).all()


def test_the_same_from_python(run, masked, files, tmp_path):
    directory, picture, mask = files
    flags = [f"--image={directory / 'a.png'}", f"--mask={directory / 'mask.png'}", "--class_labels=3", f"--out={tmp_path / 'x'}"]
    assert_works(run("sample", f"--workdir={masked[0]}", *flags, "--num_images=4", "--batch_size=8"))
    images = speedit_jax.load(masked[0]).sample([3], image=picture, mask=mask == 255, num_images=4)
    # Other batches: rounding may turn a pixel by one.
    assert abs(images.astype(int) - np.load(tmp_path / "x.npz")["arr_0"]).max() <= 1


def test_what_cannot_be_is_one_line(run, trained, masked, files, tmp_path):
    given = [f"--image={files[0] / 'a.png'}", f"--mask={files[0] / 'mask.png'}", "--inpaint=network", f"--out={tmp_path / 'x'}"]
    assert_fails(run("sample", f"--workdir={trained}", *given), "inpaint=network", "data.mask", "projection")
    assert_fails(run("convert", f"--workdir={masked[0]}", f"--to={tmp_path / 'x.safetensors'}"), "data.mask", "init_from")
    assert_fails(run("train", *TINY, "--config.data.mask=circles", f"--workdir={tmp_path / 'y'}"), "data.mask", "boxes")
    assert not list(tmp_path.iterdir())
