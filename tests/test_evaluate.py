"""The command that measures images: its numbers against NumPy's, and each mistake as one line."""

import json
import subprocess
import sys
from pathlib import Path

import inception_weights
import numpy as np
import pytest
from commands import EIGHT_DEVICES, ONE_DEVICE, ROOT, assert_fails, assert_works, checksums
from PIL import Image

from speedit_jax.data.sources import load_digits
from speedit_jax.metrics.frechet import Gaussian, frechet_distance
from speedit_jax.testing.hosts import hosts

FEW = ["--kid_subsets=3", "--kid_subset_size=50"]
PIXELS = ["--features=pixels", *FEW]


def digits(split):
    images, _ = load_digits(split)
    return np.round((images + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The held-out digits stand for samples."""
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, digits("held_out"), np.zeros(355, np.int32))
    return path


@pytest.fixture(scope="module")
def evaluated(run, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "x.json"
    result = run("evaluate", f"--images={samples}", "--reference=digits", *PIXELS, f"--out={out}")
    assert_works(result)
    return result, json.loads(out.read_text())


def test_the_numbers_are_numpys(evaluated):
    _, record = evaluated
    flat = [digits(split).reshape(-1, 64) / 255 for split in ("held_out", "train")]
    expected = frechet_distance(*(Gaussian(x.mean(axis=0), np.cov(x, rowvar=False)) for x in flat))
    # Pixels are float32 between 0 and 1.
    np.testing.assert_allclose(record["metrics"]["fid"], expected, rtol=1e-5)
    assert record["metrics"].keys() == {"fid", "kid", "kid_std", "precision", "recall"}
    assert 0 < record["metrics"]["fid"] < 0.2
    assert 0.8 < record["metrics"]["precision"] <= 1 and 0.3 < record["metrics"]["recall"] <= 1


def test_table_and_json(evaluated, samples):
    result, record = evaluated
    assert f"{record['metrics']['fid']:.6g}" in result.out and "355 images" in result.out and "1442 images" in result.out
    assert record["images"] == {"from": str(samples), "n": 355, "shape": [8, 8, 1]}
    assert record["reference"] == {
        "from": "digits",
        "n": 1442,
        "shape": [8, 8, 1],
        "crop": "none",
        "images": 1442,
        "statistics": [],
    }
    assert record["features"] == "pixels" and record["inception"] is None
    settings = {"batch_size": 64, "seed": 0, "is_splits": 10, "kid_subsets": 3, "kid_subset_size": 50, "pr_neighbours": 3}
    assert record["settings"] == settings
    assert {"jax", "numpy", "speedit_jax"} <= record["versions"].keys()


def test_how_the_images_were_sampled_is_written_down(run, samples, tmp_path):
    drawn = {"checkpoint_step": 6, "weights": "ema", "sampler": "ddim", "num_steps": 3, "guidance_scale": 1.5}
    (tmp_path / "new.npz").write_bytes(samples.read_bytes())
    (tmp_path / "new.json").write_text(json.dumps(drawn | {"seed": 0}))
    flags = [f"--images={tmp_path / 'new.npz'}", "--reference=digits", "--features=pixels", "--metrics=fid"]
    assert_works(run("evaluate", *flags, f"--out={tmp_path / 'fid.json'}"))
    assert json.loads((tmp_path / "fid.json").read_text())["images"]["sampled"] == drawn


def test_batches_and_devices_do_not_matter(run, evaluated, samples, tmp_path):
    flags = [f"--images={samples}", "--reference=digits", *PIXELS, f"--out={tmp_path / 'x.json'}", "--batch_size=50"]
    assert_works(run("evaluate", *flags, xla_flags=EIGHT_DEVICES))
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["devices"] == 8
    for name, value in evaluated[1]["metrics"].items():
        np.testing.assert_allclose(record["metrics"][name], value, rtol=1e-9, err_msg=name)


def test_statistics_stand_for_the_reference(run, evaluated, samples, tmp_path):
    path = tmp_path / "reference.npz"
    result = run("evaluate", "--reference=digits", "--features=pixels", f"--save_statistics={path}")
    assert_works(result)
    assert "1442 images" in result.out and str(path) in result.out
    with np.load(path) as file:
        assert file["mu"].shape == (64,) and file["sigma"].shape == (64, 64) and "mu_s" not in file.files
        adms = {"mu": file["mu"], "sigma": file["sigma"]}
    flags = [f"--images={samples}", "--features=pixels"]
    out = tmp_path / "x.json"
    assert_works(run("evaluate", *flags, f"--reference={path}", f"--out={out}"))
    record = json.loads(out.read_text())
    assert record["metrics"].keys() == {"fid"} and record["reference"]["n"] == 1442
    np.testing.assert_allclose(record["metrics"]["fid"], evaluated[1]["metrics"]["fid"], rtol=1e-9)
    assert record["reference"]["shape"] == [8, 8, 1] and record["reference"]["crop"] == "none"
    # As ADM's reference batches: statistics of many images, and some of them.
    np.savez(path, digits("train")[:200], **adms, features=np.array("pixels"))
    assert_works(run("evaluate", *flags, *FEW, f"--reference={path}", f"--out={out}"))
    both = json.loads(out.read_text())["metrics"]
    assert both["fid"] == record["metrics"]["fid"] and both.keys() == evaluated[1]["metrics"].keys()


def test_images_against_themselves(run, tmp_path):
    for i, image in enumerate(digits("held_out")[:70]):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{i:02d}.png")
    flags = [f"--images={tmp_path}", f"--reference=folder:{tmp_path}", "--features=pixels", "--metrics=pr,fid,pr"]
    result = run("evaluate", *flags, f"--out={tmp_path / 'x.json'}")
    assert_works(result)
    metrics = json.loads((tmp_path / "x.json").read_text())["metrics"]
    assert list(metrics) == ["precision", "recall", "fid"]
    assert metrics["precision"] == metrics["recall"] == 1 and metrics["fid"] < 1e-9


def test_statistics_of_another_size_are_refused(run, samples, tmp_path):
    path = tmp_path / "reference.npz"
    size = ["--size=4,16,1", "--features=pixels", f"--save_statistics={path}"]
    assert_works(run("evaluate", "--reference=synthetic", *size))
    flags = ["evaluate", f"--images={samples}", "--features=pixels", f"--reference={path}"]
    assert_fails(run(*flags), f"{path} holds statistics of images of 4x16x1", "8x8x1")
    with np.load(path) as file:
        np.savez(path, mu=file["mu"], sigma=file["sigma"], features=file["features"])  # as another program would write it
    result = run(*flags)
    assert_works(result)
    assert f"note: {path} does not say of what size and crop its images were" in result.out


def test_the_inception_score_asks_for_no_reference(run, samples, tmp_path):
    flags = ["evaluate", f"--images={samples}", "--metrics=is"]
    assert_fails(run(*flags), "--inception: ", "pt_inception-2015-12-05-6726825d.pth")
    assert_fails(run(*flags[:2], "--metrics=is,fid"), "--reference is missing", "--metrics=is needs none")
    assert_fails(run(*flags, f"--save_statistics={tmp_path / 'x.npz'}"), "--reference is missing")


MISTAKES = {
    "no reference": (["--reference="], ["--reference is missing"]),
    "no images": (["--images="], ["--images is missing", "--save_statistics"]),
    "unknown metric": (["--metrics=fid,foo"], ["--metrics", "foo", "sfid"]),
    "metric of Inception": (["--metrics=fid,sfid"], ["sfid needs --features=inception"]),
    "unknown features": (["--features=clip"], ["features", "clip", "pixels"]),
    "no weights": (["--features=inception"], ["pt_inception-2015-12-05-6726825d.pth", "https://", "--inception: "]),
    "weights that are not there": (["--features=inception", "--inception=/no/such.pth"], ["/no/such.pth", "https://"]),
    "images that are not there": (["--images=/no/such"], ["/no/such", "FILE.npz"]),
    "other sizes": (["--reference=synthetic", "--size=8,8"], ["8x8x1", "8x8x3", "folder:PATH"]),
    "size": (["--reference=synthetic", "--size=8,8,3,1"], ["--size=8,8,3,1", "SIDE"]),
    "subset": (["--kid_subset_size=400"], ["kid", "400", "--images has 355"]),
    "neighbours": (["--pr_neighbours=355"], ["pr", "356", "355"]),
    "number": (["--kid_subsets=0"], ["kid_subsets"]),
    "out": (["--out=/dev/null/x.json"], ["/dev/null/x.json"]),
    "split of no reference": (["--reference=", "--metrics=is", "--split=held_out"], ["--split=held_out", "--reference"]),
    "size of what has its own": (["--size=16,16,1"], ["--size=16,16,1", "folder:"]),
    "CLIP that is not asked for": (["--clip=/no/such"], ["--clip=/no/such", "--metrics"]),
    "captions that nothing reads": (["--captions=.txt"], ["--captions=.txt", "--metrics"]),
    "weights that pixels do not need": (["--inception=/no/such.pth"], ["--inception=/no/such.pth", "--features=pixels"]),
    "statistics' name": (["--save_statistics=/tmp/x"], ["--save_statistics=/tmp/x", ".npz"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(run, samples, case):
    flags, words = MISTAKES[case]
    assert_fails(run("evaluate", f"--images={samples}", "--reference=digits", "--features=pixels", *flags), *words)


def test_mistakes_of_files(run, samples, tmp_path):
    def fails(path, *words, flags=()):
        assert_fails(run("evaluate", f"--images={samples}", f"--reference={path}", "--features=pixels", *flags), *words)

    path = tmp_path / "x.npz"
    path.write_bytes(samples.read_bytes()[:500])
    fails(path, str(path), "cannot be read")
    np.savez(path, something=np.zeros(3))
    fails(path, str(path), "neither arr_0 nor mu and sigma")
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), features=np.array("pixels"))
    fails(path, str(path), "5 features", "64")
    fails(path, "kid needs the reference's images", flags=["--metrics=kid"])
    fails(path, "--out", "the settings of --images", flags=[f"--out={samples.with_suffix('.json')}"])
    fails(path, str(path), "no splits", "split=held_out", flags=["--split=held_out"])
    fails(path, "holds statistics already", flags=[f"--save_statistics={tmp_path / 'y.npz'}"])
    np.savez(path, digits("train")[:3])
    fails(path, "pr needs at least 4 images", "--reference has 3")
    np.savez(path, np.zeros((5, 40, 40, 3), np.uint8))
    assert_fails(run("evaluate", f"--images={path}", f"--reference={path}", "--features=pixels"), "40x40x3", "4096")


def test_what_is_measured_is_not_overwritten(run, samples, tmp_path):
    images, reference = tmp_path / "new.npz", tmp_path / "reference.npz"
    for path in (images, reference):
        path.write_bytes(samples.read_bytes())
    images.with_suffix(".json").write_text("{}")
    Image.fromarray(digits("train")[0, ..., 0]).resize((32, 32)).save(tmp_path / "0.png")
    (tmp_path / "new").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "new" / "0.png")
    before = checksums(tmp_path)
    settings, flags = images.with_suffix(".json"), ["--features=pixels", f"--reference={reference}"]
    cases = (
        (f"--images={images}", f"--out={images}", "--images"),
        (f"--images={images}", f"--out={reference}", "--reference"),
        (f"--images={images}", f"--out={tmp_path}/new/../new.json", "the settings of --images"),
        (f"--images={tmp_path}/new/", f"--out={settings}", "the settings of --images"),
        (f"--images=folder:{tmp_path}/new", f"--out={settings}", "the settings of --images"),
        (f"--images={images}", f"--save_statistics={images}", "--images"),
        (f"--images={images}", f"--save_statistics={reference}", "--reference"),
    )
    for given, out, what in cases:
        assert_fails(run("evaluate", *flags, given, out), out, f"would overwrite {what};")
    both = [f"--out={tmp_path / 'x.npz'}", f"--save_statistics={tmp_path / 'x.npz'}"]
    assert_fails(run("evaluate", *flags, f"--images={images}", *both), "--save_statistics", "--out")
    assert checksums(tmp_path) == before


@pytest.mark.slow
def test_with_inception(run, tmp_path):
    """Random weights through the whole command: samples, an ADM statistics file, one device and eight."""
    with np.load(Path(__file__).parent / "fixtures" / "evaluation.npz") as recorded:
        names, shapes = recorded["names"], recorded["shapes"]
    weights = {n: inception_weights.weight(n, tuple(int(k) for k in s if k)) for n, s in zip(names, shapes, strict=True)}
    np.savez(tmp_path / "weights.npz", **weights)
    np.savez(tmp_path / "samples.npz", np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8))
    flags = [
        f"--inception={tmp_path / 'weights.npz'}",
        "--batch_size=8",
        "--is_splits=2",
        "--kid_subsets=3",
        f"--out={tmp_path / 'x.json'}",
    ]
    assert_works(run("evaluate", f"--images={tmp_path / 'samples.npz'}", "--metrics=is", *flags))
    alone = json.loads((tmp_path / "x.json").read_text())
    assert alone["metrics"].keys() == {"is", "is_std"} and alone["reference"]["from"] is None
    source = tmp_path / "reference.npz"
    images = np.random.default_rng(1).integers(0, 200, (14, 16, 16, 3), np.uint8)
    np.savez(source, images)
    results = []
    for xla_flags in ("", EIGHT_DEVICES):
        assert_works(
            run("evaluate", f"--images={tmp_path / 'samples.npz'}", f"--reference={source}", *flags, xla_flags=xla_flags)
        )
        results.append(json.loads((tmp_path / "x.json").read_text()))
    one, eight = (result["metrics"] for result in results)
    assert one.keys() == {"fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall"}
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert results[0]["inception"]["weights"] == "weights.npz" and len(results[0]["inception"]["sha256"]) == 64
    saved = tmp_path / "adm.npz"
    assert_works(run("evaluate", f"--reference={source}", *flags, f"--save_statistics={saved}"))
    with np.load(saved) as file:
        assert {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")} == {
            "mu": (2048,),
            "sigma": (2048, 2048),
            "mu_s": (2023,),
            "sigma_s": (2023, 2023),
        }
    assert_works(run("evaluate", f"--images={tmp_path / 'samples.npz'}", f"--reference={saved}", *flags))
    again = json.loads((tmp_path / "x.json").read_text())["metrics"]
    assert again.keys() == {"fid", "sfid", "is", "is_std"}
    for name in again:
        np.testing.assert_allclose(again[name], one[name], rtol=1e-4, err_msg=name)


SLOW = """
import functools, time
import jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=3)
from speedit_jax import cli, evaluate
measure = evaluate.measure
def slowly(*args):
    time.sleep(12)
    return measure(*args)
evaluate.measure = slowly
cli.run(evaluate.evaluate)
"""


def test_other_processes_wait_for_the_numbers(tmp_path):
    """The one that computes them takes longer here than the others wait for it at their end."""
    flags = ["--multihost", "--images=digits", "--reference=digits", "--split=held_out", "--features=pixels", "--metrics=fid"]
    command = [sys.executable, "-c", SLOW, *flags, f"--out={tmp_path / 'fid.json'}"]
    processes = [subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE | host) for host in hosts(2)]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert json.loads((tmp_path / "fid.json").read_text())["metrics"]["fid"] > 0
