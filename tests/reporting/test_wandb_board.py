"""The optional writer for Weights & Biases, with the real package in its offline mode."""

import builtins
import importlib.util
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.errors import UserError
from speedit_jax.reporting import wandb_board
from speedit_jax.reporting.telemetry import Telemetry
from speedit_jax.reporting.wandb_board import WandbBoard, open_board
from speedit_jax.sampling.images import write_png

INSTALLED = importlib.util.find_spec("wandb") is not None


@pytest.fixture
def offline(monkeypatch):
    """The package, which then writes files and asks nobody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    return pytest.importorskip("wandb")


def records(workdir):
    """What the offline files of all runs of a workdir hold, protobuf messages, in the order of time.

    A file is LevelDB's log after seven bytes: blocks of 32 KiB of fragments, each a checksum, a length, a type and the data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        data, at, message = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768  # no room for a fragment
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            message += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last of several
                found.append(Record.FromString(message))
                message = b""
    return found


def history(found):
    items = [{item.key or item.nested_key[0]: item.value_json for item in r.history.item} for r in found if r.HasField("history")]
    return [(int(row["step"]), row) for row in items]


def write(workdir, steps):
    board = open_board(workdir, "tests", {"seed": 3})
    t = Telemetry(workdir, first_step=steps[0] - 1, num_steps=10, batch_size=4, wandb=board)
    for step in steps:
        t.step(step)
        t.metrics(step, {"loss": jnp.float32(step / 2), "skipped_in_a_row": jnp.int32(0)})
    path, grid = workdir / "samples" / f"{steps[-1]}.png", np.zeros((16, 16, 1), np.uint8)
    write_png(path, grid)
    t.grid(steps[-1], grid, path)
    t.close()


def test_scalars_the_grid_and_the_config_and_a_run_that_goes_on(offline, tmp_path, capfd):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4])  # goes on from a checkpoint before the third
    found, deadline = [], time.monotonic() + 60
    while sum(r.HasField("exit") for r in found) < 2:  # W&B's own process writes the last blocks when finish() is over
        assert time.monotonic() < deadline
        time.sleep(0.1)
        found = records(tmp_path)
    runs = [r.run for r in found if r.HasField("run")]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id").read_text().strip()}
    assert {run.project for run in runs} == {"tests"}
    assert ("seed", "3") in {(u.key, u.value_json) for run in runs for u in run.config.update}
    rows = history(found)
    assert [(step, float(row["loss"])) for step, row in rows if "loss" in row] == [(1, 0.5), (2, 1), (3, 1.5), (3, 1.5), (4, 2)]
    assert len([row for _, row in rows if any("samples" in name for name in row)]) == 2
    assert "warning" not in capfd.readouterr().err


def test_a_failure_is_one_line_and_training_goes_on(offline, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no network\nand more")

    monkeypatch.setattr(offline, "init", fail)
    write(tmp_path, [1, 2])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: W&B: no network; training continues without it"
    ]


def test_it_is_off_unless_asked_for(tmp_path, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert name.partition(".")[0] != "wandb"
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    wandb_board.check("")
    assert open_board(tmp_path, "", {}) is None


@pytest.mark.skipif(INSTALLED, reason="wandb is installed")
def test_where_it_is_not_installed_one_line_says_what_to_do(tmp_path, capsys):
    with pytest.raises(UserError, match=r"training\.wandb_project=mine.*pip install -e '\.\[wandb\]'"):
        wandb_board.check("mine")
    assert WandbBoard(tmp_path, "mine", {}).scalars(1, {}) is None
    assert "training continues without it" in capsys.readouterr().err
