"""The numbers of a model card: only what was measured of the weights that it is of."""

import json
import shutil

import pytest
from commands import assert_works

from speedit_jax.conversion import measured
from speedit_jax.conversion.tables import one_device
from speedit_jax.training.run import open_run


@pytest.fixture(scope="module")
def workdir(run, trained, tmp_path_factory):
    """A run with samples of its weights in it, and what evaluate and likelihood say of them."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(trained, workdir)
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=16", f"--out={workdir}/new.png"))
    evaluate = ["evaluate", f"--images={workdir}/new.npz", "--reference=digits", "--features=pixels", "--metrics=fid,pr"]
    assert_works(run(*evaluate, f"--out={workdir}/numbers.json"))
    assert_works(run("likelihood", f"--workdir={workdir}", "--num_images=8", "--num_steps=2", f"--out={workdir}/bits.json"))
    with (workdir / "metrics.jsonl").open("a") as file:
        later = {"heldout_mse": 0.5, "raw_heldout_mse": 0.75, "eval_kid": float("nan")}
        file.write(json.dumps({"step": 6} | later) + "\n" + json.dumps({"step": 9, "heldout_mse": 9.0}) + "\n")
    return workdir


def test_each_number_with_what_it_is_of(workdir):
    numbers = measured.numbers(open_run(workdir, 6, one_device()), "ema")
    record = json.loads((workdir / "numbers.json").read_text())["metrics"]
    bits = json.loads((workdir / "bits.json").read_text())["total_bpd"]
    trained = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if "eval_fid" in line]
    found = [(number.name, number.value, number.step) for number in numbers]
    assert sorted(found) == sorted(
        [("fid", trained[-1]["eval_fid"], 6), ("held-out mse", 0.5, 6), ("bits per dimension", bits, 6)]
        + [(name, value, 6) for name, value in record.items()]
    )
    for number in numbers:
        assert ("not of Inception's features" in number.meaning) == (number.name == "fid")
        assert "digits" in number.of and str(workdir) not in number.of
    assert {number.of for number in numbers if number.name == "recall"} == {
        "16 samples (ddim, 3 steps, guidance 1.25), against 1,797 of digits"
    }


def test_other_weights_have_other_numbers(workdir):
    newest = open_run(workdir, 6, one_device())
    assert [(number.name, number.value) for number in measured.numbers(newest, "raw")] == [("held-out mse", 0.75)]
    earlier = open_run(workdir, 3, one_device())
    assert {(number.name, number.step) for number in measured.numbers(earlier, "ema")} == {("fid", 3)}
    assert measured.newest_grid(earlier) is None and "6" in measured.newest_grid(newest).stem


def test_numbers_of_another_run_are_left_out(workdir, tmp_path):
    moved = tmp_path / "other"
    shutil.copytree(workdir, moved)
    assert "recall" not in {number.name for number in measured.numbers(open_run(moved, 6, one_device()), "ema")}
