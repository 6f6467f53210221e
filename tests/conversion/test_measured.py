"""The numbers of a model card: only what was measured of the weights that it is of."""

import json
import shutil
import types

import pytest
from commands import assert_works

from speedit_jax.config import get_config
from speedit_jax.conversion import measured
from speedit_jax.conversion.tables import one_device
from speedit_jax.training.run import open_run


@pytest.fixture(scope="module")
def workdir(run, trained, tmp_path_factory):
    """A run with samples of its weights in it, and what evaluate says of them."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(trained, workdir)
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=16", f"--out={workdir}/new.png"))
    evaluate = ["evaluate", f"--images={workdir}/new.npz", "--reference=digits", "--features=pixels", "--metrics=fid,pr"]
    assert_works(run(*evaluate, f"--out={workdir}/numbers.json"))
    with (workdir / "metrics.jsonl").open("a") as file:
        later = {"heldout_mse": 0.5, "raw_heldout_mse": 0.75, "eval_kid": float("nan")}
        file.write(json.dumps({"step": 6} | later) + "\n" + json.dumps({"step": 9, "heldout_mse": 9.0}) + "\n")
    return workdir


def test_each_number_with_what_it_is_of(workdir):
    numbers = measured.numbers(open_run(workdir, 6, one_device()), "ema")
    record = json.loads((workdir / "numbers.json").read_text())["metrics"]
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if "eval_fid" in line]
    expected = [("fid (pixels)", logged[-1]["eval_fid"]), ("held-out mse", 0.5)]
    expected += [(f"{name} (pixels)", value) for name, value in record.items()]
    assert sorted((number.name, number.value) for number in numbers) == sorted(expected)
    assert {number.step for number in numbers} == {6}
    for number in numbers:
        assert ("not of Inception's features" in number.meaning) == (number.name == "fid (pixels)")
        assert "digits" in number.of and str(workdir) not in number.of
    (of,) = {number.of for number in numbers if number.name == "recall (pixels)"}
    assert of == "16 samples (ddim, 3 steps, guidance 1.25), against 1,442 of digits"


@pytest.mark.parametrize(
    ("source", "split", "where"),
    [
        ("", "", "digits (held_out)"),
        ("", "train", "digits (train)"),
        ("tfds:mnist", "", "tfds:mnist (train)"),
        ("tfds:mnist", "test", "tfds:mnist (test)"),
    ],
)
def test_held_out_examples_are_those_that_were_measured(tmp_path, source, split, where):
    """Of another source they are those of training, whatever part the run itself trains on."""
    config = get_config()
    config.data.update(source="digits", split="held_out")
    config.evaluation.update(loss_source=source, loss_split=split)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 6, "heldout_mse": 0.5}) + "\n")
    (number,) = measured.numbers(types.SimpleNamespace(config=config, workdir=tmp_path, step=6), "ema")
    assert number.of == f"256 examples of {where}"


def test_numbers_are_of_the_samples_that_were_measured(tmp_path):
    """Not of those that have their name by now."""
    run = types.SimpleNamespace(config=get_config(), workdir=tmp_path, step=6)
    drawn = {"checkpoint_step": 6, "weights": "ema", "sampler": "ddim", "num_steps": 3, "guidance_scale": 1.5}
    images = {"from": str(tmp_path / "new.npz"), "n": 16, "shape": [8, 8, 1]}
    record = {"images": images, "metrics": {"fid": 1.0}, "features": "inception"}
    (tmp_path / "new.json").write_text(json.dumps(drawn | {"guidance_scale": 4}))
    for said, guidance in (({"sampled": drawn}, "1.5"), ({}, "4")):  # earlier versions did not say
        (tmp_path / "fid.json").write_text(json.dumps(record | {"images": images | said}))
        (number,) = measured.numbers(run, "ema")
        assert number.of == f"16 samples (ddim, 3 steps, guidance {guidance})"
    other = record | {"images": images | {"sampled": drawn | {"weights": "raw"}}}
    (tmp_path / "fid.json").write_text(json.dumps(other))
    assert measured.numbers(run, "ema") == []


def test_samples_of_another_run_are_known_as_a_folder_too(tmp_path):
    """sample --png_files writes them there, of weights of the same step."""
    run = types.SimpleNamespace(config=get_config(), workdir=tmp_path / "mine", step=6)
    drawn = {"checkpoint_step": 6, "weights": "ema", "sampler": "ddim", "num_steps": 3, "guidance_scale": 1.5}
    for name, count in (("mine", 1), ("other", 0)):
        (tmp_path / name / "new").mkdir(parents=True)
        images = {"from": f"folder:{tmp_path / name / 'new'}", "n": 16, "shape": [8, 8, 1], "sampled": drawn}
        record = {"images": images, "metrics": {"fid": 1.0}, "features": "inception"}
        (tmp_path / "mine" / "fid.json").write_text(json.dumps(record))
        assert len(measured.numbers(run, "ema")) == count, name


def test_other_weights_have_other_numbers(workdir):
    newest = open_run(workdir, 6, one_device())
    assert [(number.name, number.value) for number in measured.numbers(newest, "raw")] == [("held-out mse", 0.75)]
    earlier = open_run(workdir, 3, one_device())
    assert {(number.name, number.step) for number in measured.numbers(earlier, "ema")} == {("fid (pixels)", 3)}
    assert measured.newest_grid(earlier) is None and "6" in measured.newest_grid(newest).stem


def test_numbers_of_another_run_are_left_out(workdir, tmp_path):
    def names(directory):
        return {number.name for number in measured.numbers(open_run(directory, 6, one_device()), "ema")}

    shutil.copytree(workdir, tmp_path / "other")
    assert "recall (pixels)" in names(workdir) - names(tmp_path / "other")
    (workdir / "new.npz").unlink()  # as if the run had been moved
    assert "recall (pixels)" in names(tmp_path / "other")
