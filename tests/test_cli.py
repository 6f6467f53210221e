"""The commands as a user meets them: one readable line for every mistake, and the way from training to images.

A few commands are run by `python -m` itself; the rest by tests/commands.py.
"""

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
from commands import EIGHT_DEVICES, ONE_DEVICE, ROOT, TINY, assert_fails, assert_works, run_alone
from PIL import Image

import configs.digits


def checksums(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--config.training.sample_every=6", "--config.evaluation.every=3"]
    result = run("train", *TINY, f"--workdir={workdir}", *flags)
    assert_works(result)
    assert f"python -m speedit_jax.sample --workdir={workdir}" in result.out
    return workdir


@pytest.fixture(scope="module")
def without_null_label(run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("without_null_label") / "run"
    flags = ["--config.model.label_dropout=0.0", "--config.training.num_steps=3", f"--workdir={workdir}"]
    assert_works(run("train", *TINY, *flags))
    return workdir


BAD_TRAIN_FLAGS = {
    "typo in a key": (["--config.model.widht=16"], ["widht", 'Did you mean "width"']),
    "not a number": (["--config.training.num_steps=abc"], ["config.training.num_steps", "abc"]),
    "not an integer": (["--config.training.batch_size=1.5"], ["config.training.batch_size", "1.5"]),
    "not a boolean": (["--config.data.flip=maybe"], ["config.data.flip", "maybe"]),
    "no value": (["--config.training.batch_size"], ["config.training.batch_size"]),
    "a section for a value": (["--config.model=3"], ["config.model"]),
    "a key below a value": (["--config.model.name.x=1"], ["--config.KEY", "below a value"]),
    "argument that is no flag": (["extra"], ["extra"]),
    "unknown strategy": (["--config.timesteps.strategy=foo"], ["timesteps.strategy", "foo", "speed_cvpr25"]),
    "unknown model": (["--config.model.name=DiT-Q/2"], ["model.name", "DiT-Q/2", "XL"]),
    "unknown schedule": (["--config.diffusion.schedule=foo"], ["diffusion.schedule", "foo", "linear"]),
    "unknown prediction": (["--config.diffusion.prediction=eps"], ["diffusion.prediction", "eps", "epsilon, x0, v"]),
    "unknown loss": (["--config.diffusion.loss=l2"], ["diffusion.loss", "l2", "rescaled_kl"]),
    "bound of a flow": (["--config.diffusion.loss=kl", "--config.diffusion.path=gvp"], ["diffusion.loss=kl", "gvp", "use mse"]),
    "steps that are none": (["--config.sampling.num_steps=fast", "--config.training.sample_every=3"], ["fast", "ddim50"]),
    "dual of losses": (["--config.timesteps.strategy=clts", "--config.timesteps.dual=true"], ["timesteps.dual", "clts"]),
    "unknown learning rate": (["--config.optim.schedule=foo"], ["optim.schedule", "foo", "cosine"]),
    "unknown sampler": (["--config.sampling.sampler=foo", "--config.training.sample_every=3"], ["sampler", "foo", "ddim"]),
    "unknown best": (["--config.evaluation.best=foo", "--config.evaluation.every=3"], ["evaluation.best=foo", "fid"]),
    "unknown source": (["--config.data.source=foo"], ["data.source", "foo", "digits"]),
    "folder that is not there": (["--config.data.source=folder:/no/such"], ["data.source", "/no/such"]),
    "workdir that cannot be": (["--workdir=/dev/null/run"], ["--workdir", "/dev/null/run"]),
}


@pytest.mark.parametrize("case", BAD_TRAIN_FLAGS)
def test_a_mistake_in_training_is_one_line_and_writes_nothing(run, tmp_path, case):
    flags, words = BAD_TRAIN_FLAGS[case]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags), *words)
    assert not any(tmp_path.iterdir())


BAD_NUMBERS = {
    "seed": -1,
    "data.threads": -1,
    "data.height": 0,
    "optim.learning_rate": -1.0,
    "optim.b1": 2.0,
    "optim.warmup_steps": -1,
    "training.num_steps": 0,
    "training.sample_every": -1,
    "training.max_skipped_in_a_row": 0,
    "checkpoint.keep_every": -1,
    "sampling.grid_images": 0,
    "evaluation.num_images": 1,
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_number_out_of_range_is_one_line_and_writes_nothing(run, tmp_path, name):
    flags = ["--config.training.sample_every=3", f"--config.{name}={BAD_NUMBERS[name]}"]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags), f"{name}={BAD_NUMBERS[name]}")
    assert not any(tmp_path.iterdir())


def test_an_empty_synthetic_set(run, tmp_path):
    flags = ["--config=configs/base.py", f"--workdir={tmp_path / 'run'}"]
    assert_fails(run("train", *flags, "--config.data.synthetic_size=0"), "data.synthetic_size=0")
    assert not any(tmp_path.iterdir())


def test_one_of_several_processes_without_the_others(run, tmp_path):
    flags = [*TINY, f"--workdir={tmp_path / 'run'}", "--multihost"]
    assert_fails(run("train", *flags), "--multihost", "JAX_COORDINATOR_ADDRESS")


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(run, tmp_path):
    result = run("train", *TINY, f"--workdir={tmp_path / 'run'}", "--dry_run", xla_flags=EIGHT_DEVICES)
    assert_works(result)
    for words in ("attention/qkv/kernel", "temporaries", "MiB a device", "all-reduce", "GFLOP"):
        assert words in result.out
    assert not any(tmp_path.iterdir())


def test_a_profile_of_some_steps(run, tmp_path):
    flags = [*TINY, f"--workdir={tmp_path}", "--config.training.profile_at=2", "--config.training.profile_steps=2"]
    assert_works(run("train", *flags))
    assert [path.stat().st_size > 10_000 for path in tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")] == [True]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["time_waiting_for_data"] <= last["time_per_step"] and last["time_paused"] > 0


BAD_MESHES = {
    "batch that does not divide": (["--config.training.batch_size=63"], ["training.batch_size=63", "8 devices"]),
    "mesh that does not fit": (["--config.mesh.data=3"], ["mesh.data=3", "8 devices"]),
    "two axes that take the rest": (["--config.mesh.fsdp=-1"], ["mesh.fsdp=-1"]),
    "heads that do not divide": (["--config.mesh.tensor=4"], ["mesh.tensor=4", "2 heads"]),
}


@pytest.mark.parametrize("case", BAD_MESHES)
def test_a_mistake_about_eight_devices_is_one_line(run, tmp_path, case):
    flags, words = BAD_MESHES[case]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags, xla_flags=EIGHT_DEVICES), *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("override", [[], ["--config.model.width=16"]], ids=["plain", "with an override"])
def test_a_config_file_that_does_not_exist(run, tmp_path, override):
    flags = ["--config=configs/nope.py", f"--workdir={tmp_path / 'run'}", *override]
    assert_fails(run("train", *flags), "configs/nope.py")


def test_a_broken_config_file(run, tmp_path):
    broken = {
        "syntax": ("def get_config(:\n", ["syntax"]),
        "key": ("from speedit_jax import config\n\ndef get_config():\n    return config.get_config().modle\n", ["modle"]),
        "type": ("def get_config():\n    c = 1 + 'a'\n", ["unsupported operand"]),
        "module": ("import nosuchmodule\n", ["nosuchmodule"]),
        "function": ("x = 1\n", ["get_config"]),
        "dict": ("def get_config():\n    return {}\n", ["get_config", "ConfigDict"]),
    }
    for name, (text, words) in broken.items():
        (tmp_path / f"{name}.py").write_text(text)
        assert_fails(run("train", f"--config={tmp_path / name}.py", f"--workdir={tmp_path / 'run'}"), *words)


@pytest.mark.parametrize("given", [[], ["--config=", "--workdir="]], ids=["left out", "empty"])
def test_missing_flags(run, given):
    workdir, config = ["--workdir=runs/x"], ["--config=configs/digits.py"]
    assert_fails(run("train", *workdir, *given[:1]), "--config is missing")
    assert_fails(run("train", *config, *given[1:]), "--workdir is missing")
    assert_fails(run("sample", *given[1:]), "--workdir is missing")
    assert_fails(run("report", *given[1:]), "--workdir is missing")


def test_flags_before_the_config_file(run):
    assert_fails(run("train", "--config.model.width=3", "--config=configs/digits.py"), "config.model.width")


def test_in_a_process_of_its_own(tmp_path):
    assert_fails(run_alone("train", *TINY, f"--workdir={tmp_path}", "--config.modle.name=x"), "modle", 'Did you mean "model"')
    assert_fails(run_alone("train", *TINY, f"--workdir={tmp_path}", "--nosuch=1"), "nosuch")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("times", [1, 2], ids=["before the loop", "twice in the loop"])
def test_ctrl_c_leaves_no_traceback(tmp_path, times):
    # What one Ctrl-C in the loop does is test_kill_resume.py's.
    log, workdir = tmp_path / "log", tmp_path / "run"
    waits = [lambda: "devices " in log.read_text()]
    if times == 2:
        waits = [(workdir / "metrics.jsonl").exists, lambda: "SIGINT: saving after this step" in log.read_text()]
    argv = [sys.executable, "-m", "speedit_jax.train", *TINY, f"--workdir={workdir}", "--config.training.num_steps=100000"]
    with log.open("w") as file:
        process = subprocess.Popen(argv, cwd=ROOT, env=ONE_DEVICE, stdout=file, stderr=subprocess.STDOUT)
    try:
        for ready in waits:
            while process.poll() is None and not ready():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        assert process.wait(600) in (-signal.SIGINT, 130)
    finally:
        process.kill()
    assert "Traceback" not in log.read_text() and "Fatal" not in log.read_text(), log.read_text()


@pytest.mark.parametrize("command", ["train", "sample", "report", "verify"])
def test_help(run, command):
    result = run(command, "--help")
    assert result.code in (0, 1)  # absl's own is 1
    assert "--workdir" in result.out and f"python -m speedit_jax.{command}" in result.out
    assert command != "train" or "--config" in result.out
    assert not result.err


def test_the_name_of_the_model_after_a_colon(run, tmp_path):
    workdir = tmp_path / "run"
    config = ["--config=configs/digits.py:DiG-tiny/2", *TINY[1:], "--config.model.remat=lean"]
    result = run("train", *config, f"--workdir={workdir}")
    assert_works(result)
    assert "DiG-tiny/2" in result.out and "remat lean" in result.out and "xla mixer" in result.out
    assert "at 16 tokens DiT is as fast or faster" in result.out
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=4", f"--out={tmp_path / 'new'}"))
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (4, 8, 8, 1)
    # The other backbone would be another run.
    assert_fails(run("train", *TINY, f"--workdir={workdir}"), "model.name was 'DiG-tiny/2', now 'DiT-tiny/2'")


def test_another_run_is_not_overwritten(run, trained, tmp_path):
    before = checksums(trained)
    for flags, words in (
        (["--config.seed=5"], ["seed was 0, now 5"]),
        (["--config.training.num_steps=9"], ["training.num_steps was 6, now 9"]),
        (["--config.data.source=synthetic"], ["data.source", "the data are not the same"]),
    ):
        assert_fails(run("train", *TINY, *flags, f"--workdir={trained}"), "another run", *words)
    assert checksums(trained) == before
    (tmp_path / "metrics.jsonl").write_text("mine")
    assert_fails(run("train", *TINY, f"--workdir={tmp_path}"), str(tmp_path), "metrics.jsonl", "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_finished_run_says_so_and_changes_nothing(run, trained):
    before = checksums(trained)
    result = run("train", *TINY, f"--workdir={trained}")
    assert_works(result)
    assert "complete" in result.out and "step 6 of 6" in result.out
    assert checksums(trained) == before


def test_a_run_leaves_a_page_of_itself(run, trained, tmp_path):
    result = run("report", f"--workdir={trained}", f"--out={tmp_path / 'new' / 'x.html'}")
    assert_works(result)
    assert f"{tmp_path}/new/x.html" in result.out
    pages = [path.read_text() for path in (trained / "report.html", tmp_path / "new" / "x.html")]
    first, second = (page[: page.index("<footer>")] for page in pages)  # which says when it was made
    assert first == second
    for words in ("complete</span>", "step 6 of 6", "data:image/png", "host memory, peak", "model.width=16", "<svg "):
        assert words in first
    [record] = json.loads((trained / "environment.json").read_text())
    assert (record["first_step"], record["last_step"], record["devices"]) == (0, 6, 1) and record["host_peak_bytes"] > 2**26
    assert_fails(run("report", f"--workdir={trained}", "--out=/dev/null/x"), "/dev/null/x")
    assert_fails(run("report", f"--workdir={tmp_path}"), str(tmp_path), "no run")


BAD_SAMPLE_FLAGS = {
    "class number": (["--class_labels=3,10"], ["--class_labels", "10", "0..9"]),
    "class name": (["--class_labels=cat"], ["--class_labels", "cat"]),
    "negative class": (["--class_labels=-1"], ["--class_labels", "-1"]),
    "no class": (["--class_labels="], ["--class_labels"]),
    "step": (["--checkpoint_step=5"], ["step 5", "3, 6", "newest or best"]),
    "no step": (["--checkpoint_step=last"], ["step last", "3, 6", "newest or best"]),
    "out": (["--out=/dev/null/x.png"], ["/dev/null/x", "--out"]),
    "sampler": (["--sampler=foo"], ["sampler", "foo", "dpm++"]),
    "steps": (["--num_steps=1001"], ["1001", "1000"]),
    "spacing": (["--spacing=foo"], ["spacing", "foo", "logsnr"]),
    "eta": (["--eta=2"], ["eta=2"]),
    "guidance": (["--guidance_scale=-1"], ["guidance_scale=-1"]),
    "interval": (["--guidance_low=0.8", "--guidance_high=0.2"], ["guidance_low=0.8", "guidance_high=0.2"]),
    "guidance schedule": (["--guidance_schedule=foo"], ["guidance_schedule", "foo", "cosine"]),
    "guide": (["--guide_workdir=/no/such"], ["--guide_workdir", "/no/such"]),
    "guide without a run": (["--guide_step=3"], ["--guide_step=3", "--guide_workdir"]),
    "weights": (["--weights=best"], ["weights", "best", "raw"]),
    "number": (["--num_images=0"], ["num_images"]),
    "unknown flag": (["--nosuch=1"], ["nosuch"]),
    "config key": (["--config.model.width=16"], ["config.model.width"]),
}


@pytest.mark.parametrize("case", BAD_SAMPLE_FLAGS)
def test_a_mistake_in_sampling_is_one_line_and_writes_nothing(run, trained, case):
    flags, words = BAD_SAMPLE_FLAGS[case]
    before = checksums(trained)
    assert_fails(run("sample", f"--workdir={trained}", *flags), *words)
    assert checksums(trained) == before


def test_no_checkpoint_to_sample(run, tmp_path):
    assert_fails(run("sample", f"--workdir={tmp_path}"), "no checkpoints", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert_fails(run("sample", f"--workdir={tmp_path}"), "no finished checkpoint", str(tmp_path))


def test_guidance_needs_label_dropout(run, without_null_label, tmp_path):
    flags = [f"--workdir={without_null_label}", "--num_images=2", f"--out={tmp_path / 'x'}"]
    assert_fails(run("sample", *flags, "--guidance_scale=2"), "guidance_scale=2", "label dropout")
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
        "batch_size": 64,
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
    assert settings["guide"] == {"workdir": str(trained), "checkpoint_step": 3}
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


def test_eight_devices_draw_the_same_images(sample, ten):
    images, labels, settings = sample(xla_flags=EIGHT_DEVICES)
    assert np.abs(images.astype(int) - ten[0]).max() <= 1
    np.testing.assert_array_equal(labels, ten[1])
    assert settings["devices"] == 8


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
    assert "Already there" in again.out
    other = run("sample", *flags, "--seed=1", "--guidance_scale=3")
    assert_fails(
        other, f"{tmp_path / 'x'}.npz holds images of other settings", "seed was 0, now 1", "guidance_scale", "--overwrite"
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
