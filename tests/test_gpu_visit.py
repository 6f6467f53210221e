"""A visit to a GPU, rehearsed: every measurement in tiny sizes on a CPU, gone on with, and the page of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import COMPILATION

from benchmarks.gpu import page, plan
from benchmarks.gpu.record import Record, finished, read

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILATION, "PYTHONPATH": str(ROOT)}


def visit(out, *arguments):
    command = [sys.executable, "-m", "benchmarks.gpu.visit", f"--out={out}", "--rehearsal", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("visit")
    ran = visit(out, "--seconds=800")  # ends as soon as all is measured; a busy machine takes long
    assert ran.returncode == 0, ran.stderr
    return out


def test_a_rehearsal_measures_everything_to_the_last_line(rehearsed):
    records = read([rehearsed / "results.jsonl"])
    assert (records[0]["kind"], records[-1]["kind"]) == ("visit", "end")
    done, wanted = finished(records), plan.rehearsal()
    mixers = {f"{m.id}/{which}" for m in wanted.mixers if m.side != "jla" for which in ("forward", "backward")}
    expected = mixers | {item.id for item in (*wanted.steps, *wanted.samples)} | {"ceiling", "tests/values"}
    assert expected <= done, [record for record in records if record.get("error")]
    by_id = {record["id"]: record for record in records if "id" in record}
    assert by_id["tests/values"]["passed"] > 0 and not by_id["tests/values"]["failed"]
    for step in wanted.steps:
        record = by_id[step.id]
        assert len(record["seconds"]) == wanted.rounds and min(record["seconds"]) > 0 and record["temp_bytes"] > 0
    # What cannot run here is named, not left out in silence.
    missing = [record for record in records if record["kind"] in ("missing", "failed")]
    assert any("jla" in json.dumps(record) for record in missing)


def test_a_second_visit_does_what_the_first_left(rehearsed, tmp_path):
    first = rehearsed / "results.jsonl"
    lines = first.read_text().splitlines()
    left = plan.rehearsal().steps[1].id
    kept = [line for line in lines if json.loads(line).get("id") != left]
    (tmp_path / "first.jsonl").write_text("\n".join(kept) + '\n{"kind": "step", "id": "cut o')
    ran = visit(tmp_path / "second", "--seconds=800", "--have", str(tmp_path / "first.jsonl"))
    assert ran.returncode == 0, ran.stderr
    measured = {
        r["id"] for r in read([tmp_path / "second" / "results.jsonl"]) if r["kind"] in ("step", "mixer", "sample", "ceiling")
    }
    # The first step again, for the card's drift, was measured then, too.
    assert measured == {left}


def test_the_page(rehearsed):
    records = page.Records(read([rehearsed / "results.jsonl"]))
    text = page.page(records, plan.rehearsal(), None, None)
    step = records.get(plan.rehearsal().steps[0].id)
    assert f"{step['images_per_s']:.1f}" in text and "A rehearsal on a CPU" in text
    assert "No module named 'jla'" in text
    empty = page.page(page.Records([]), plan.full(), None, None)
    assert empty.count(page.MISSING) > 50 and "None" not in empty


def test_a_speed_of_a_goal():
    """The ratio that the page shows is theirs over ours."""
    ours, theirs = (
        {"kind": "step", "id": step.id, "seconds": [seconds], "images_per_s": 1.0, "mfu": 0.5}
        for step, seconds in ((plan.full().steps[2], 0.2), (plan.full().torch_steps[0], 0.3))
    )
    assert ours["id"].startswith("step/ours/DiT-XL-2/256") and theirs["id"].startswith("step/dit-compile/DiT-XL-2/256")
    text = page.goals(page.Records([ours, theirs]), plan.full())
    assert "DiT-XL/2, 256 px: speed over the published code under torch.compile | 1.0x | 1.50x |" in text


def test_deadlines_and_what_is_there(tmp_path, capsys):
    record = Record(tmp_path / "results.jsonl", {"there"}, time.time() + 100)
    assert record.wanted("new", 50) and not record.wanted("there", 1) and not record.wanted("long", 200)
    (skipped,) = read([record.path])
    assert skipped["kind"] == "skipped" and skipped["id"] == "long" and finished([skipped]) == set()
    full = plan.full()
    ids = [item.id for items in (full.steps, full.mixers, full.torch_mixers, full.torch_steps) for item in items]
    assert len(ids) == len(set(ids))
