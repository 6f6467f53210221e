"""Killed and resumed is the same, to the bit, as left alone: benchmarks/kill_resume.py in small."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import jax
import pytest
from commands import ONE_DEVICE

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_resume.py"
STEPS = 40


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kill_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("kill_resume")


@pytest.fixture(scope="module")
def reference(script, scratch):
    return script.uninterrupted(scratch / "uninterrupted", STEPS, ONE_DEVICE)[0]


def test_a_struck_run_ends_in_the_same_bits(script, scratch, reference):
    experiments = {
        "kill in a save": [script.Strike("saving", 1, 0.01)],
        "kill in sampling": [script.Strike("sampling", STEPS, 0.1)],
        "Ctrl-C": [script.Strike("compiling", 0, 0.1, signal.SIGINT)],
    }
    rows = {row["name"]: row for row in script.study(experiments, reference, scratch, STEPS, env=ONE_DEVICE)}
    assert {name: row["problems"] for name, row in rows.items()} == {name: [] for name in experiments}
    assert all(row["hits"][0]["phase"] != "finished" for row in rows.values())
    log = (scratch / "Ctrl-C.0.log").read_text()
    assert "SIGINT: saving after this step" in log and f"of {STEPS}, everything is saved in" in log
    assert "Resuming from the checkpoint of step" in (scratch / "Ctrl-C.1.log").read_text()
    assert not [path for path in scratch.glob("*.log") if "Traceback" in path.read_text()]


def test_the_comparison_covers_the_whole_run_and_sees_one_bit(script, reference):
    parts = ("params", "ema", "opt/1/0/mu", "opt/1/0/nu", "opt/1/0/count", "step", "skipped", "skipped_in_a_row")
    for part in parts:
        assert any(name.startswith(f"checkpoint {STEPS}: {part}") for name in reference), part
    evaluated = [json.loads(line) for name, line in reference.items() if name.startswith("metrics") and "eval_fid" in line]
    assert [record["step"] for record in evaluated] == list(range(script.EVALUATE_EVERY, STEPS + 1, script.EVALUATE_EVERY))
    best = max(evaluated, key=lambda record: record["eval_recall"])
    assert reference["best"] == best["step"] and f'"recall": {best["eval_recall"]}' in reference[f"evaluation {best['step']}"]
    kept = {int(name.split()[1]) for name in reference if name.startswith("evaluation ")}
    assert kept == {10, 30, 40}, "the best, and the two newest"
    assert f"samples/step_{STEPS:07d}.png" in reference and f"metrics.jsonl line {STEPS // script.LOG_EVERY}" in reference
    for name, value in reference.items():
        if name.startswith("checkpoint"):
            dtype, shape, data = value
            flipped = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
            assert script.differences(reference, reference | {name: flipped}) == [name]
    assert script.differences(reference, reference | {"leftover x.partial": True}) == ["leftover x.partial"]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"], ids=["plain", "deterministic"])
def test_on_a_gpu(script, tmp_path, flags):
    """Whether the same holds there, where autotuning may choose other kernels in the second process, and under which flag."""
    if jax.default_backend() != "gpu":
        pytest.skip("on a CPU the tests above; pytest -m gpu")
    # Each process compiles for itself: one that finds what the first one compiled would prove less.
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {flags}", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    reference = script.uninterrupted(tmp_path / "uninterrupted", STEPS, env)[0]
    experiments = {"kill": [script.Strike("stepping", STEPS // 2, 0.1)]}
    (row,) = script.study(experiments, reference, tmp_path, STEPS, env=env)
    assert row["hits"][0]["phase"] != "finished" and row["problems"] == []
