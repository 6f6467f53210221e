"""The held-out loss as train logs it: at its steps, the same after an interruption, and without a trace in all else."""

import json
import shutil

import pytest
from commands import TINY, assert_works

FLAGS = [*TINY, "--config.evaluation.loss_every=3", "--config.evaluation.loss_images=20"]


def metrics(workdir, prefixes=("time_",)):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(prefixes)} for line in lines]


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("held_out") / "run"
    return run("train", *FLAGS, f"--workdir={workdir}"), workdir


def test_logged_at_its_steps(trained):
    result, workdir = trained
    assert_works(result)
    assert "held out   every 3 steps the mse of 20 examples of digits (held_out) at 4 noise levels each\n" in result.out
    logged = {line["step"]: {name for name in line if "heldout" in name} for line in metrics(workdir)}
    names = {f"{prefix}heldout_mse{q}" for prefix in ("", "raw_") for q in ("", "_q1", "_q2", "_q3", "_q4")}
    assert logged == {2: set(), 3: names, 4: set(), 6: names}
    page = (workdir / "report.html").read_text()
    assert "Held-out mean squared error" in page and "Held-out mse by quarter, raw weights" in page


def test_the_same_after_an_interruption(run, trained, tmp_path):
    _, workdir = trained
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "6")
    result = run("train", *FLAGS, f"--workdir={again}")
    assert_works(result)
    assert "Resuming from the checkpoint of step 3" in result.out
    assert metrics(again) == metrics(workdir)


def test_all_else_is_as_without_it(run, trained, tmp_path):
    workdir = tmp_path / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    with_it = [line for line in metrics(trained[1], ("time_", "heldout", "raw_heldout")) if line["step"] % 2 == 0]
    assert metrics(workdir) == with_it
