"""The commands on a run whose newest checkpoint is damaged."""

import contextlib
import json
import shutil

import pytest
from commands import TINY, assert_fails, assert_works, own_lines

from benchmarks.kill_resume import differences, restore
from speedit_jax.training.checkpoint import arrays
from speedit_jax.training.run import open_run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run with the checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    return workdir


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory):
    """(a copy with one bit of checkpoint 6 flipped, the file)."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("damaged") / "run")
    path = max((workdir / "checkpoints" / "6" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return workdir, path.name


def test_a_whole_run(run, trained):
    result = run("verify", f"--workdir={trained}")
    assert result.code == 0 and own_lines(result.err) == ""
    assert [line.split()[:2] for line in result.out.splitlines()] == [
        ["checkpoints/3", "whole"],
        ["checkpoints/6", "whole"],
        ["run.json", "whole"],
        ["metrics.jsonl", "whole"],
    ]


def test_what_is_damaged_is_said(run, damaged, tmp_path):
    workdir, name = damaged
    (workdir / "checkpoints" / "damaged-4").mkdir()
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo\xff')
    result = run("verify", f"--workdir={workdir}", f"--out={tmp_path / 'found.json'}")
    assert result.code == 1 and name in result.out and "1 of 4 lines cannot be read: 4" in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    states = {finding["part"]: finding["state"] for finding in found["findings"]}
    assert found["damaged"] == 2 and states == {
        "checkpoints/3": "whole",
        "checkpoints/6": "damaged",
        "checkpoints/damaged-4": "unknown",
        "run.json": "whole",
        "metrics.jsonl": "damaged",
    }


def test_no_run_to_verify(run, tmp_path):
    assert_fails(run("verify", f"--workdir={tmp_path}"), "holds no run")
    assert_fails(run("verify"), "--workdir is missing")


@pytest.mark.parametrize("command", ["sample", "convert"])
def test_a_damaged_checkpoint_is_not_used(run, damaged, tmp_path, command):
    workdir, name = damaged
    out = {"sample": ("--num_images=2", f"--out={tmp_path / 'a.png'}"), "convert": (f"--to={tmp_path / 'a.safetensors'}",)}
    assert_fails(run(command, f"--workdir={workdir}", *out[command]), name, "checkpoints/6 is damaged", "choose another step")
    assert not any(tmp_path.iterdir())
    assert_works(run(command, f"--workdir={workdir}", "--checkpoint_step=3", *out[command]))


def test_training_goes_on_from_the_newest_whole_one(run, trained, damaged, tmp_path):
    workdir = shutil.copytree(damaged[0], tmp_path / "run")
    (workdir / "run.json").write_text("{")
    flags = [*TINY, f"--workdir={workdir}"]
    assert_fails(run("train", *flags, "--strict"), "checkpoints/6 is damaged", "without --strict")
    result = run("train", *flags)
    assert_works(result)
    assert f"checkpoint {workdir}/checkpoints/6 is damaged (state/" in result.out and "set aside as damaged-6" in result.out
    assert "run.json was missing or damaged; it is written again" in result.out
    assert "Resuming from the checkpoint of step 3." in result.out
    assert (workdir / "run.json").read_bytes() == (trained / "run.json").read_bytes()
    assert differences(kept(workdir), kept(trained)) == [] and len(kept(trained)) > 20


def kept(workdir):
    """All numbers of the last step, and what was logged."""
    run = open_run(workdir, 6)
    with contextlib.closing(run.checkpoints):
        state = {name: array.tobytes() for name, array in arrays(restore(run)).items()}
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return state | {f"line {i}": {k: v for k, v in line.items() if k[:5] != "time_"} for i, line in enumerate(lines)}
