"""From images to latents to a trained model to pictures, with a small random autoencoder."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import EIGHT_DEVICES, ONE_DEVICE, ROOT, TINY, assert_fails, assert_works
from PIL import Image
from safetensors.numpy import load_file, save_file

from speedit_jax.testing.hosts import hosts
from speedit_jax.testing.vae_weights import write_vae

IMAGES = 23  # two classes; shards of 5, of which the last has 3
SIZE = (16, 24)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        directory = root / ("cat", "dog")[i % 2]
        directory.mkdir(exist_ok=True)
        blocks = rng.integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(directory / f"{i:03d}.png")
    return root


def flags(folder, vae, out):
    size = f"--size={SIZE[0]},{SIZE[1]}"
    return [f"--source=folder:{folder}", f"--vae={vae}", f"--out={out}", size, "--batch_size=2", "--shard_size=5"]


@pytest.fixture(scope="module")
def encoded(run, folder, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "latents"
    result = run("encode", *flags(folder, vae, out))
    assert_works(result)
    assert "23 latents (8, 12, 16) in 5 shards" in result.out and "images/s" in result.out
    return out


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_moments_are_the_autoencoders(encoded, folder, vae):
    import jax

    from speedit_jax.data.latents import open_latents
    from speedit_jax.models.vae import load_vae

    network, params = load_vae(str(vae))
    source = open_latents(encoded)
    assert source.class_names == ("cat", "dog")
    files = sorted(folder.rglob("*.png"))
    assert len(source) == len(files)
    for i in (0, 4, IMAGES - 1):  # of both classes; from the middle and the end of shards
        with Image.open(files[i]) as image:
            pixels = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BOX), np.float32)[None] / 127.5 - 1
        assert source[i]["label"] == ("cat", "dog").index(files[i].parent.name)
        for stored, x in zip(source[i]["moments"], (pixels, pixels[:, :, ::-1]), strict=True):
            expected = np.concatenate(jax.jit(network.encode)(params, x), axis=-1)[0]
            # float16 on disk: half a unit in the last of 11 bits, and a little float32 rounding.
            np.testing.assert_allclose(stored, expected, rtol=2**-11, atol=1e-4)


def test_again_does_nothing(run, encoded, folder, vae):
    before = contents(encoded)
    assert_works(run("encode", *flags(folder, vae, encoded)))
    assert contents(encoded) == before
    result = run("encode", f"--out={encoded}", "--verify")
    assert_works(result)
    assert "23 latents in 5 shards; all checksums match" in result.out


def start(arguments, env):
    command = [sys.executable, "-m", "speedit_jax.encode", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE | env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_twice_is_the_same_to_the_byte(encoded, folder, vae, tmp_path):
    """By two hosts, by one, and again by two, which share what is missing."""
    out = tmp_path / "latents"
    arguments = flags(folder, vae, out)
    for shards, environments in ((1, hosts(2)), (3, [{}])):
        processes = [start([*arguments, *["--multihost"] * bool(env)], env) for env in environments]
        while all(p.poll() is None for p in processes) and len(list(out.glob("*-of-*.json"))) < shards:
            time.sleep(0.001)
        for process in processes:
            process.kill()
        assert [process.wait() for process in processes] == [-signal.SIGKILL] * len(processes), processes[0].stderr.read()
        assert not (out / "header.json").exists()
    (out / "00004-of-00005.dead.partial").touch()  # as a kill in the middle of a shard leaves it
    for process in [start([*arguments, "--multihost"], env) for env in hosts(2)]:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
    assert contents(out) == contents(encoded)


def test_an_error_on_one_host_does_not_wait_for_the_others(folder, vae, tmp_path):
    """Both see a directory of their own."""
    processes = [start([*flags(folder, vae, tmp_path / env["JAX_PROCESS_ID"]), "--multihost"], env) for env in hosts(2)]
    processes[1].wait(timeout=120)
    processes[0].kill()
    errors = processes[1].communicate()[1].splitlines()
    processes[0].communicate()
    assert processes[1].returncode == 1, errors
    assert errors[-1].startswith(f"error: --out={tmp_path / '1'} on process 1 is not the directory of process 0"), errors


def test_eight_devices_encode_the_same(run, encoded, folder, vae, tmp_path):
    from speedit_jax.data.latents import open_latents

    assert_works(run("encode", *flags(folder, vae, tmp_path / "l"), xla_flags=EIGHT_DEVICES))
    one, eight = open_latents(encoded), open_latents(tmp_path / "l")
    for i in range(IMAGES):
        # A rounding of float32 may cross a rounding of float16.
        np.testing.assert_allclose(one[i]["moments"], eight[i]["moments"], rtol=2**-10, atol=1e-4)


MISTAKES = {
    "no out": (["--out="], ["--out is missing"]),
    "no source": (["--source="], ["--source is missing"]),
    "no vae": (["--vae="], ["--vae is missing"]),
    "no such folder": (["--source=folder:/no/such"], ["/no/such"]),
    "no such class": (["--classes=cat,cow"], ["data.classes=cat,cow"]),
    "no such vae": (["--vae=/no/such"], ["/no/such", "config.json"]),
    "size": (["--size=big"], ["--size=big"]),
    "no size": (["--size=0"], ["--size=0: give"]),
    "three sizes": (["--size=16,24,3"], ["--size=16,24,3: give"]),
    "odd size": (["--size=17"], ["17x17"]),
    "unwritable": (["--out=/dev/null/x"], ["--out=/dev/null/x"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run, folder, vae, tmp_path, case):
    extra, words = MISTAKES[case]
    assert_fails(run("encode", *flags(folder, vae, tmp_path / "l"), *extra), *words)
    assert not any(tmp_path.iterdir())


def test_another_encoding_is_not_mixed_in(run, encoded, folder, vae):
    before = contents(encoded)
    assert_fails(run("encode", *flags(folder, vae, encoded), "--size=16"), "was encoded with other settings", "images.shape")
    assert_fails(run("encode", f"--source=latents:{encoded}", f"--vae={vae}", "--out=/tmp/x"), "already latents")
    assert contents(encoded) == before


def remake(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shards(directory):
    return {name: digest for name, digest in contents(directory).items() if name.endswith(".array_record")}


def test_moved_images_and_another_scale_encode_nothing_anew(run, encoded, folder, vae, tmp_path):
    out, images, moved = (Path(tmp_path / name) for name in ("latents", "images", "vae"))
    for old, new in ((encoded, out), (folder, images), (vae, moved)):
        shutil.copytree(old, new)  # with the files' times
    remake(moved / "config.json", lambda config: config.update(scaling_factor=100.0))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    result = run("encode", *flags(images, moved, out))
    assert_works(result)
    assert (
        "5 of 5 shards are already finished" in result.out
        and "scaled by scaling_factor=100, shift_factor=0.1159: mean" in result.out
    )
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert "standard deviation" in warning and "scaling_factor=100" in warning
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")} == times
    assert shards(out) == shards(encoded)
    for name in ("header.json", "encoding.json"):
        saved = json.loads((out / name).read_text())
        assert (saved["latents"]["vae"], saved["images"]["source"]) == (str(moved), f"folder:{images}")
        assert saved["latents"]["config"]["scaling_factor"] == 100


def test_scaled_statistics_are_printed(encoded, run, folder, vae):
    result = run("encode", *flags(folder, vae, encoded))
    header = json.loads((encoded / "header.json").read_text())
    (line,) = [line for line in result.out.splitlines() if line.startswith("per channel, scaled by scaling_factor=0.3611")]
    expected = np.round(0.3611 * np.array(header["std"]), 3).tolist()
    assert line.endswith(f"std {expected}")


def test_other_images_are_not_mixed_in(run, encoded, folder, vae, tmp_path):
    out = tmp_path / "latents"
    shutil.copytree(encoded, out)
    remake(out / "encoding.json", lambda content: content["images"].update(fingerprint="of other images"))
    before = contents(out)
    assert_fails(
        run("encode", *flags(folder, vae, out)),
        f"images of folder:{folder} were added, removed or edited since {out}",
        "name another --out",
    )
    assert contents(out) == before


def test_an_autoencoder_that_overflows_names_the_image(run, folder, vae, tmp_path):
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    for value, words in ((1e6, ["float16 holds at most 65504"]), (np.nan, ["encoder.conv_out.weight is not finite"])):
        broken, out = tmp_path / f"vae {value}", tmp_path / f"latents {value}"
        shutil.copytree(vae, broken)
        scaled = tensors | {"encoder.conv_out.weight": tensors["encoder.conv_out.weight"] * np.float32(value)}
        save_file(scaled, broken / "diffusion_pytorch_model.safetensors")
        result = run("encode", *flags(folder, broken, out))
        assert result.code == 1 and "Traceback" not in result.err
        line = result.err.splitlines()[-1]
        assert line.startswith("error: ") and all(word in line for word in words), result.err
        if np.isfinite(value):
            assert "image 0 (cat/000.png)" in line
            assert [path.name for path in out.iterdir()] == ["encoding.json"]
        else:
            assert not out.exists()


LATENTS = [flag for flag in TINY if "scan_unroll" not in flag and "configs/" not in flag and "sample_every" not in flag]
LATENTS = [
    "--config=configs/imagenet.py:DiT-tiny/2",
    *LATENTS,
    "--config.training.sample_every=6",
    "--config.sampling.grid_images=4",
]


def train(run, workdir, *flags):
    result = run("train", *LATENTS, "--config.sampling.guidance_channels=0", f"--workdir={workdir}", *flags)
    assert_works(result)
    return result


@pytest.fixture(scope="module")
def trained(run, encoded, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = train(run, workdir, f"--config.data.source=latents:{encoded}")
    assert "latents    (8, 12, 16)" in result.out and "stored" in result.out
    return workdir


def test_a_model_of_latents_draws_images(run, trained, tmp_path, vae):
    result = run("sample", f"--workdir={trained}", "--class_labels=dog,cat", "--num_images=4", f"--out={tmp_path / 'new'}")
    assert_works(result)
    images = np.load(tmp_path / "new.npz")["arr_0"]
    assert images.shape == (4, *SIZE, 3) and images.std() > 0
    assert json.loads((tmp_path / "new.json").read_text())["latents"]["vae"] == str(vae)
    with Image.open(trained / "samples" / "step_0000006.png") as grid:
        assert grid.mode == "RGB"


def test_the_autoencoder_of_the_latents_is_asked_for(run, trained, folder, vae, encoded, tmp_path):
    other = write_vae(tmp_path / "other", "small", seed=1)
    sample = ["sample", f"--workdir={trained}", f"--out={tmp_path / 'new'}", "--num_images=2"]
    assert_fails(run(*sample, f"--vae={other}"), "is not the autoencoder of these latents", str(vae))
    assert_fails(run(*sample, "--vae=/no/such"), "/no/such")
    flags = [*LATENTS, f"--config.data.source=latents:{encoded}", f"--workdir={tmp_path / 'run'}"]
    assert_fails(run("train", *flags, f"--config.data.vae={other}"), "is not the autoencoder of these latents")
    assert_fails(run("train", *flags, "--config.sampling.clip=True"), "sampling.clip")
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_know_its_autoencoder(run, vae, tmp_path):
    """As imported weights may not: the channels are all there is to check."""
    workdir = tmp_path / "run"
    synthetic = ["--config.data.source=synthetic", "--config.data.synthetic_classes=2"]
    assert_works(run("train", *TINY, *synthetic, "--config.data.channels=16", f"--workdir={workdir}"))
    sample = ["sample", f"--workdir={workdir}", f"--out={tmp_path / 'new'}", "--num_images=2"]
    assert_works(run(*sample, f"--vae={vae}"))
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (2, 16, 16, 3)
    assert_works(run("train", *TINY, f"--workdir={tmp_path / 'digits'}"))
    refused = run("sample", f"--workdir={tmp_path / 'digits'}", f"--vae={vae}", f"--out={tmp_path / 'new'}")
    assert_fails(refused, "latents of 16 channels", "latents of 1")


def test_encoding_at_every_step(run, folder, vae, tmp_path):
    size = [f"--config.data.height={SIZE[0]}", f"--config.data.width={SIZE[1]}"]
    workdir = tmp_path / "run"
    flags = [f"--config.data.source=folder:{folder}", f"--config.data.vae={vae}", *size]
    result = train(run, workdir, *flags)
    assert "latents    (8, 12, 16)" in result.out and "encoded at every step" in result.out
    other = write_vae(tmp_path / "other", "small", seed=1)
    refused = run(
        "train", *LATENTS, "--config.sampling.guidance_channels=0", f"--workdir={workdir}", *flags, f"--config.data.vae={other}"
    )
    assert_fails(refused, "the autoencoder has changed")


def test_without_its_autoencoder_pictures_show_channels(run, encoded, folder, tmp_path):
    moved = write_vae(tmp_path / "vae", "small")
    out = tmp_path / "latents"
    assert_works(run("encode", *flags(folder, moved, out)))
    moved.rename(tmp_path / "elsewhere")
    result = train(run, tmp_path / "run", f"--config.data.source=latents:{out}")
    assert "image grids show the first three latent channels" in result.out
    sample = ["sample", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'new'}", "--num_images=2"]
    assert_fails(run(*sample), str(moved), "--vae")
    assert_works(run(*sample, f"--vae={tmp_path / 'elsewhere'}"))


def test_the_image_that_stands_in_has_its_own_caption(run, vae, tmp_path):
    """Captions are encoded without a look at the images, so latents have to say which are those of another image."""
    from speedit_jax.config import get_config
    from speedit_jax.data.sources import open_source

    images, latents, texts = (tmp_path / name for name in ("images", "latents", "texts"))
    images.mkdir()
    for i in range(4):
        Image.new("RGB", SIZE[::-1], (60 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"number{i}")
    (images / "1.png").write_bytes(b"no image")
    assert run("encode", *flags(images, vae, latents), "--shard_size=2", "--max_broken=1").code == 0
    assert_works(run("encode_text", f"--data=folder:{images}", "--encoder=words", f"--out={texts}"))
    data = get_config().data
    data.update(source=f"latents:{latents}", text=str(texts))
    source = open_source(data)
    np.testing.assert_array_equal(source[1]["moments"], source[2]["moments"])
    tokens = [source[i]["texts"].tokens[0] for i in range(4)]
    np.testing.assert_array_equal(tokens[1], tokens[2])
    assert (tokens[0] != tokens[1]).any() and (tokens[2] != tokens[3]).any()
