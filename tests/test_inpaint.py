"""sample --image and --mask: the pixels that stay are the input's, and a mistake is one line."""

import json

import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works
from PIL import Image

import speedit_jax
from speedit_jax.testing.vae_weights import write_vae

FLOW = ["--config.diffusion.path=linear", "--config.timesteps.strategy=uniform"]


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """{"vp", "flow": a workdir}."""
    found = {}
    for name, flags in (("vp", []), ("flow", FLOW)):
        found[name] = tmp_path_factory.mktemp(name) / "run"
        assert_works(run("train", *TINY, *flags, f"--workdir={found[name]}"))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """two/a.png and two/b.png of noise, mask.png that fills the right half, and others that are wrong."""
    directory, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    (directory / "two").mkdir()
    (directory / "empty").mkdir()
    pictures = rng.integers(0, 256, (2, 8, 8)).astype(np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, pixels in {
        "two/a": pictures[0],
        "two/b": pictures[1],
        "mask": mask,
        "white": np.full((8, 8), 255, np.uint8),
        "black": 0 * mask,
        "grey": mask // 2,
        "large": np.zeros((9, 16), np.uint8),
    }.items():
        Image.fromarray(pixels).save(directory / f"{name}.png")
    return directory, pictures, mask


def drawn(run, out, *flags):
    assert_works(run("sample", f"--out={out}", "--num_images=5", "--batch_size=4", *flags))
    return np.load(f"{out}.npz")["arr_0"][..., 0]


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("vp", ["--sampler=ddim"]),
        ("vp", ["--sampler=ddpm", "--num_steps=4", "--resample=2", "--jump=2", "--noclip"]),
        ("vp", ["--sampler=dpm++", "--eta=1", "--guidance_scale=2"]),
        ("vp", ["--sampler=ddpm", "--inpaint=repaint", "--num_steps=4", "--jump=2"]),
        ("vp", ["--sampler=ddim", "--strength=0.5"]),
        ("flow", ["--sampler=euler"]),
        ("flow", ["--sampler=heun", "--num_steps=4", "--resample=2", "--jump=1"]),
        ("flow", ["--sampler=sde", "--strength=0.7"]),
    ],
    ids=str,
)
def test_pixels_that_stay_are_the_inputs(run, runs, files, tmp_path, kind, flags):
    directory, pictures, mask = files
    flags = [f"--workdir={runs[kind]}", f"--image={directory / 'two'}", f"--mask={directory / 'mask.png'}", *flags]
    images = drawn(run, tmp_path / "x", *flags)
    given = pictures[np.arange(5) % 2]
    np.testing.assert_array_equal(images[:, mask == 0], given[:, mask == 0])
    assert (images[:, mask == 255] != given[:, mask == 255]).mean() > 0.5
    assert (images[0] != images[2]).any(), "each sample has noise of its own"


def test_where_all_is_to_be_filled_it_is_plain_sampling(run, runs, files, tmp_path):
    plain = drawn(run, tmp_path / "plain", f"--workdir={runs['vp']}")
    image = [f"--workdir={runs['vp']}", f"--image={files[0] / 'two' / 'a.png'}", f"--mask={files[0] / 'white.png'}"]
    np.testing.assert_array_equal(drawn(run, tmp_path / "x", *image), plain)
    assert (drawn(run, tmp_path / "y", *image, "--strength=0.4") != plain).any()


def test_other_pictures_are_not_mixed_in(run, runs, files, tmp_path):
    directory, pictures, _ = files
    flags = [f"--workdir={runs['vp']}", f"--out={tmp_path / 'x'}", "--num_images=2", f"--mask={directory / 'mask.png'}"]
    assert_works(run("sample", *flags, f"--image={directory / 'two' / 'a.png'}"))
    known = json.loads((tmp_path / "x.json").read_text())["known"]
    assert known["method"] == "projection" and len(known["image_sha256"]) == len(known["mask_sha256"]) == 64
    Image.fromarray(pictures[0]).save(tmp_path / "copy.bmp")
    assert "Nothing to do" in run("sample", *flags, f"--image={tmp_path / 'copy.bmp'}").out
    assert_fails(run("sample", *flags, f"--image={directory / 'two' / 'b.png'}"), "image_sha256", "--overwrite")


MISTAKES = {
    "mask alone": (["--mask=mask.png"], ["--mask", "needs --image"]),
    "strength alone": (["--strength=0.5"], ["--strength", "needs --image"]),
    "image alone": (["--image=two/a.png"], ["without a mask", "strength"]),
    "no mask": (["--image=two/a.png", "--strength=0.5", "--inpaint=repaint"], ["inpaint=repaint", "mask"]),
    "no file": (["--image=none.png", "--mask=mask.png"], ["none.png"]),
    "empty": (["--image=empty", "--mask=mask.png"], ["empty", "no image"]),
    "size": (["--image=large.png", "--mask=mask.png"], ["large.png", "16 x 9", "8 x 8"]),
    "size of mask": (["--image=two/a.png", "--mask=large.png"], ["large.png", "16 x 9"]),
    "grey": (["--image=two/a.png", "--mask=grey.png"], ["grey.png", "127", "white (255)"]),
    "black": (["--image=two/a.png", "--mask=black.png"], ["black.png", "nothing to fill"]),
    "names": (["--image=two", "--mask=."], ["a.png", "same name"]),
    "one image": (["--image=two/a.png", "--mask=two"], ["--mask", "one file"]),
    "strength": (["--image=two/a.png", "--mask=mask.png", "--strength=2"], ["strength=2"]),
    "jump": (["--image=two/a.png", "--mask=mask.png", "--inpaint=repaint"], ["jump=10", "3 sampling steps"]),
    "dpm": (["--image=two/a.png", "--mask=mask.png", "--inpaint=repaint", "--sampler=dpm++"], ["repaint", "dpm++", "ddim"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(run, runs, files, tmp_path, case):
    flags, words = MISTAKES[case]
    flags = [f"{k}={files[0] / v}" if k in ("--image", "--mask") else f"{k}={v}" for k, v in (f.split("=") for f in flags)]
    assert_fails(run("sample", f"--workdir={runs['vp']}", f"--out={tmp_path / 'x'}", *flags), *words)
    assert not list(tmp_path.iterdir())


def test_from_python(runs, files):
    _, pictures, mask = files
    loaded = speedit_jax.load(runs["vp"])
    images = loaded.sample(image=pictures[..., None], mask=mask == 255, num_images=3)[..., 0]
    np.testing.assert_array_equal(images[:, mask == 0], pictures[[0, 1, 0]][:, mask == 0])
    for wrong, words in (
        ({"mask": mask == 255}, "need an image"),
        ({"image": pictures[0], "strength": 0.5}, "image: uint8"),
        ({"image": pictures[..., None], "mask": mask}, "mask: uint8"),
    ):
        with pytest.raises(speedit_jax.errors.UserError, match=words):
            loaded.sample(**wrong)


def test_latents(run, tmp_path):
    """Of a run on latents the picture is encoded, and its pixels are put back into what is decoded."""
    vae = write_vae(tmp_path / "vae", "four")
    size = ["--config.data.source=synthetic", *(f"--config.data.{key}" for key in ("height=16", "width=16", "channels=3"))]
    assert_works(
        run("train", *TINY, *size, f"--config.data.vae={vae}", "--config.sampling.clip=False", f"--workdir={tmp_path}/run")
    )
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["sample", f"--workdir={tmp_path}/run", f"--image={tmp_path}/picture.png", f"--out={tmp_path}/x", "--num_images=3"]
    assert_works(run(*flags, f"--mask={tmp_path}/mask.png", "--batch_size=4", "--png_files"))
    images = np.load(tmp_path / "x.npz")["arr_0"]
    np.testing.assert_array_equal(images[:, mask == 0], np.broadcast_to(picture[mask == 0], (3, 160, 3)))
    assert (images[:, mask == 255] != picture[mask == 255]).mean() > 0.5
    assert (images[0] != images[1]).any()
    assert len(list((tmp_path / "x").rglob("*.png"))) == 3
    assert_fails(run(*flags, "--vae=none", "--strength=0.5", "--overwrite"), "--image: this run draws latents")
