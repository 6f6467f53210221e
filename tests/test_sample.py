"""sample as a user meets it: from a run's directory to images, and one readable line for every mistake."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import EIGHT_DEVICES, TINY, assert_fails, assert_works, checksums
from PIL import Image

import configs.digits


@pytest.fixture(scope="module")
def without_null_label(run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("without_null_label") / "run"
    flags = ["--config.model.label_dropout=0.0", "--config.training.num_steps=3", f"--workdir={workdir}"]
    assert_works(run("train", *TINY, *flags))
    return workdir


BAD_SAMPLE_FLAGS = {
    "class number": (["--class_labels=3,10"], ["--class_labels", "10", "0..9"]),
    "class name": (["--class_labels=cat"], ["--class_labels", "cat"]),
    "negative class": (["--class_labels=-1"], ["--class_labels", "-1"]),
    "no class": (["--class_labels="], ["--class_labels"]),
    "step": (["--checkpoint_step=5"], ["step 5", "3, 6", "newest or best"]),
    "no step": (["--checkpoint_step=last"], ["step last", "3, 6", "newest or best"]),
    "out": (["--out=/dev/null/x.png"], ["/dev/null/x", "--out"]),
    "out without a name": (["--out=."], ["--out=.", "./new"]),
    "out without a name, further up": (["--out=../"], ["--out=../", "../new"]),
    "sampler": (["--sampler=foo"], ["sampler", "foo", "dpm++"]),
    "steps": (["--num_steps=1001"], ["1001", "1000"]),
    "spacing": (["--spacing=foo"], ["spacing", "foo", "logsnr"]),
    "eta": (["--eta=2"], ["eta=2"]),
    "guidance": (["--guidance_scale=-1"], ["guidance_scale=-1"]),
    "interval": (["--guidance_low=0.8", "--guidance_high=0.2"], ["guidance_low=0.8", "guidance_high=0.2"]),
    "guidance schedule": (["--guidance_schedule=foo"], ["guidance_schedule", "foo", "cosine"]),
    "guide": (["--guide_workdir=/no/such"], ["--guide_workdir", "/no/such"]),
    "guide that guides nothing": (["--guide_workdir=TRAINED", "--guidance_scale=1"], ["--guide_workdir", "guidance_scale=1"]),
    "noise of another sampler": (["--sampler=ddpm", "--eta=0"], ["eta=0.0", "ddpm"]),
    "guide without a run": (["--guide_step=3"], ["--guide_step=3", "--guide_workdir"]),
    "weights": (["--weights=best"], ["weights", "best", "raw"]),
    "mesh": (["--mesh=8"], ["--mesh=8", "fsdp=4,tensor=2"]),
    "mesh axis": (["--mesh=fsdp=x"], ["--mesh=fsdp=x"]),
    "too many devices": (["--mesh=fsdp=64"], ["mesh.fsdp=64", "does not match"]),
    "number": (["--num_images=0"], ["num_images"]),
    "unknown flag": (["--nosuch=1"], ["nosuch"]),
    "config key": (["--config.model.width=16"], ["config.model.width"]),
}


@pytest.mark.parametrize("case", BAD_SAMPLE_FLAGS)
def test_a_mistake_in_sampling_is_one_line_and_writes_nothing(run, trained, case):
    flags, words = BAD_SAMPLE_FLAGS[case]
    before = checksums(trained)
    flags = [flag.replace("TRAINED", str(trained)) for flag in flags]
    assert_fails(run("sample", f"--workdir={trained}", *flags), *words)
    assert checksums(trained) == before


def test_no_checkpoint_to_sample(run, tmp_path):
    assert_fails(run("sample", f"--workdir={tmp_path}"), "no checkpoints", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert_fails(run("sample", f"--workdir={tmp_path}"), "no finished checkpoint", str(tmp_path))


def test_guidance_needs_label_dropout(run, without_null_label, tmp_path):
    flags = [f"--workdir={without_null_label}", "--num_images=2", f"--out={tmp_path / 'x'}"]
    assert_fails(run("sample", *flags, "--guidance_scale=2"), "guidance_scale=2", "label_dropout")
    assert_works(run("sample", *flags))
    assert json.loads((tmp_path / "x.json").read_text())["guidance_scale"] == 1


@pytest.fixture(scope="module")
def sample(run, trained, tmp_path_factory):
    """sample(*flags, xla_flags="") -> (images, labels, settings) of ten images of the classes 0..3."""

    def sample(*flags: str, xla_flags: str = "") -> tuple[np.ndarray, np.ndarray, dict]:
        out = tmp_path_factory.mktemp("sampled") / "x"
        result = run(
            "sample",
            f"--workdir={trained}",
            "--class_labels=0,1,2,3",
            "--num_images=10",
            f"--out={out}.png",
            *flags,
            xla_flags=xla_flags,
        )
        assert_works(result)
        assert sorted(path.name for path in out.parent.iterdir()) == ["x.json", "x.npz", "x.png"]
        assert f"{out}.png" in result.out
        with np.load(f"{out}.npz") as data:
            return data["arr_0"], data["arr_1"], json.loads(Path(f"{out}.json").read_text())

    return sample


@pytest.fixture(scope="module")
def ten(sample):
    return sample()


def test_samples_come_from_the_workdir_alone(ten, trained):
    images, labels, settings = ten
    assert images.dtype == np.uint8 and images.shape == (10, 8, 8, 1)
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    expected = {
        "workdir": str(trained),
        "checkpoint_step": 6,
        "weights": "ema",
        "seed": 0,
        "num_images": 10,
        "class_labels": [0, 1, 2, 3],
        "sampler": "ddim",
        "num_steps": 3,
        "eta": 0.0,
        "guidance_channels": 0,
        "clip": True,
        "batch_size": 16,
        "devices": 1,
        "device_kind": "cpu",
        "dtype": "float32",
        "latents": None,
        "png_files": False,
    }
    assert {name: settings[name] for name in expected} == expected
    assert len(settings["weights_sha256"]) == 64
    assert settings["guidance_scale"] > 1
    assert {"jax", "speedit_jax", "sampled_with_jax"} <= settings["versions"].keys()


def test_evaluations_are_those_of_sample_and_evaluate(run, trained, tmp_path):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6], "a step that is evaluated is logged, too"
    measured = {record["step"]: record["eval_fid"] for record in records if "eval_fid" in record}
    assert measured.keys() == {3, 6}
    best = min(measured, key=measured.get)
    config = configs.digits.get_config().evaluation
    sampled = [f"--num_images={config.num_images}", f"--batch_size={config.batch_size}", f"--out={tmp_path / 'x'}"]
    assert_works(run("sample", f"--workdir={trained}", "--checkpoint_step=best", *sampled))
    assert json.loads((tmp_path / "x.json").read_text())["checkpoint_step"] == best
    flags = [f"--images={tmp_path / 'x.npz'}", "--features=pixels", "--metrics=fid", f"--out={tmp_path / 'fid.json'}"]
    (statistics,) = trained.glob("reference_*.npz")
    for reference in ("digits", statistics):
        assert_works(run("evaluate", *flags, f"--reference={reference}"))
        found = json.loads((tmp_path / "fid.json").read_text())
        np.testing.assert_allclose(found["metrics"]["fid"], measured[best], rtol=1e-6)
        assert found["reference"]["n"] == 1442


def test_no_best_of_a_run_that_was_not_evaluated(run, without_null_label):
    assert_fails(run("sample", f"--workdir={without_null_label}", "--checkpoint_step=best"), "evaluation.every", "there are 3")


def test_the_same_command_gives_the_same_bits(sample, ten):
    again = sample()
    np.testing.assert_array_equal(again[0], ten[0])
    np.testing.assert_array_equal(again[1], ten[1])
    assert again[2] == ten[2]


@pytest.mark.parametrize(
    "flag",
    [
        "--weights=raw",
        "--sampler=ddpm",
        "--sampler=dpm++",
        "--spacing=logsnr",
        "--guidance_high=0.5",
        "--guidance_scale=1",
        "--seed=1",
        "--eta=1",
        "--checkpoint_step=3",
    ],
)
def test_every_setting_counts_and_is_recorded(sample, ten, flag):
    images, labels, settings = sample(flag)
    assert (images != ten[0]).any()
    np.testing.assert_array_equal(labels, ten[1])
    name, value = flag[2:].split("=")
    assert str(settings[name]) in (value, f"{value}.0")


def test_a_weaker_run_guides(sample, ten, trained):
    images, _, settings = sample(f"--guide_workdir={trained}", "--guide_step=3", "--guidance_scale=3")
    assert settings["guide"] == {"workdir": str(trained), "checkpoint_step": 3, "network": settings["network"]}
    assert ten[2]["guide"] is None
    assert (images != ten[0]).any()


def test_a_guide_must_predict_the_same(run, trained, tmp_path):
    """A run that differs in the schedule of its noise, made of the same run by editing what its checkpoint says."""
    guide = tmp_path / "guide"
    shutil.copytree(trained, guide, ignore=shutil.ignore_patterns("checksums.json"))
    meta = guide / "checkpoints" / "6" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"linear"', '"squaredcos_cap_v2"'))
    result = run("sample", f"--workdir={trained}", f"--guide_workdir={guide}", f"--out={tmp_path / 'x'}")
    assert_fails(result, str(guide), "diffusion.schedule is squaredcos_cap_v2", "linear")


def test_a_guide_draws_latents_of_the_same_autoencoder(run, trained, tmp_path):
    flags = [f"--out={tmp_path / 'x'}"]
    for name, flag in (("one", "--workdir"), ("other", "--guide_workdir")):
        copy = tmp_path / name
        shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checksums.json"))
        meta = copy / "checkpoints" / "6" / "meta" / "metadata"
        identity = json.dumps({"vae": f"the {name}", "weights": name, "config": {}})
        changed = re.sub(r'"latents": ?null', f'"latents": {identity}', meta.read_text())
        assert identity in changed
        meta.write_text(changed)
        flags.append(f"{flag}={copy}")
    assert_fails(run("sample", *flags), "--guide_workdir", "autoencoder", "the one", "the other")


def test_eight_devices_draw_the_same_images(sample, ten):
    images, labels, settings = sample(xla_flags=EIGHT_DEVICES)
    assert np.abs(images.astype(int) - ten[0]).max() <= 1
    np.testing.assert_array_equal(labels, ten[1])
    assert settings["devices"] == 8


def test_weights_shared_among_devices_draw_the_same_images(run, trained, ten, tmp_path):
    """Each of eight devices holds an eighth of the matrices, and biases whole."""
    flags = [f"--workdir={trained}", "--class_labels=0,1,2,3", "--num_images=10", f"--out={tmp_path / 'x'}"]
    result = run("sample", *flags, "--mesh=fsdp=4,tensor=2", xla_flags=EIGHT_DEVICES)
    assert_works(result)
    held, whole = map(float, re.search(r"Weights: (\S+) MiB of (\S+) MiB on each of 8 devices", result.out).groups())
    assert held < 0.4 * whole
    with np.load(tmp_path / "x.npz") as data:
        assert np.abs(data["arr_0"].astype(int) - ten[0]).max() <= 1
    settings = json.loads((tmp_path / "x.json").read_text())
    assert settings["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} and settings["weights_sha256"] == ten[2]["weights_sha256"]


def test_images_do_not_depend_on_their_batch(sample, ten):
    images, labels, _ = sample("--batch_size=4")
    assert np.abs(images.astype(int) - ten[0]).max() <= 1
    np.testing.assert_array_equal(labels, ten[1])


def test_images_that_are_there_stay(run, trained, tmp_path):
    flags = [f"--workdir={trained}", "--num_images=4", f"--out={tmp_path / 'x'}"]
    assert_works(run("sample", *flags))
    before = checksums(tmp_path)
    again = run("sample", *flags)
    assert_works(again)
    assert "Nothing to do" in again.out
    other = run("sample", *flags, "--seed=1", "--guidance_scale=3")
    assert_fails(
        other, f"{tmp_path / 'x'}.npz holds images made with other settings", "seed was 0, now 1", "guidance_scale", "--overwrite"
    )
    assert checksums(tmp_path) == before
    assert_works(run("sample", *flags, "--seed=1", "--overwrite"))
    assert json.loads((tmp_path / "x.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png"]


def test_random_classes_and_a_file_for_each_image(run, trained, tmp_path):
    flags = [f"--workdir={trained}", "--num_images=30", "--batch_size=16", "--class_labels=random", "--png_files"]
    assert_works(run("sample", *flags, f"--out={tmp_path / 'x'}"))
    with np.load(tmp_path / "x.npz") as data:
        images, labels = data["arr_0"], data["arr_1"]
    assert json.loads((tmp_path / "x.json").read_text())["class_labels"] == "random"
    assert len(set(labels.tolist())) > 5 and labels.tolist() != [i % 10 for i in range(30)]
    files = {int(path.stem): path for path in (tmp_path / "x").rglob("*.png")}
    assert sorted(files) == list(range(30))
    for i, path in files.items():
        assert path.parent.name == str(labels[i])
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[i, :, :, 0])
