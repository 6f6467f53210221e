"""Images drawn with interruptions are those drawn without, to the byte: benchmarks/sample_resume.py in small."""

import importlib.util
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, assert_works

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sample_resume.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sample_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample_resume"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawing(script, run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sample_resume") / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    return script.Drawing(workdir, images=92, batch=8, steps=150)


@pytest.fixture(scope="module")
def whole(drawing):
    """Drawn on eight devices without interruption."""
    out = drawing.workdir.with_name("whole")
    drawing.finish(out, 8)
    return out


def two_processes(drawing, outs: list[Path], *flags: str) -> list[int]:
    """Their exit codes; of four devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{s.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    processes = [drawing.start(out, 4, "--multihost", *flags, **where, JAX_PROCESS_ID=str(i)) for i, out in enumerate(outs)]
    try:
        return [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_go_on_where_one_was_killed(script, drawing, whole):
    out = drawing.workdir.with_name("killed")
    (hit,), problems = script.interrupted(drawing, out, 8, [(3, 0.0)])
    assert problems == [] and 3 <= hit < drawing.batches
    # The second sees nothing of what the first has written.
    other = drawing.workdir.with_name("nowhere") / "x"
    other.parent.mkdir()
    codes = two_processes(drawing, [out, other])
    assert codes == [0, 0], [o.with_suffix(".log").read_text()[-2000:] for o in (out, other)]
    assert f"Resuming: {8 * hit} of 92 images are finished." in out.with_suffix(".log").read_text()
    assert script.differences(whole, out) == []
    assert [path.name for path in other.parent.iterdir()] == ["x.log"]


def test_two_processes_share_the_weights(drawing, whole):
    """So neither holds them whole, and their checksum is of all."""
    outs = [drawing.workdir.with_name(f"shared{i}") for i in range(2)]
    codes = two_processes(drawing, outs, "--mesh=fsdp=8", "--num_images=8")
    assert codes == [0, 0], [out.with_suffix(".log").read_text()[-2000:] for out in outs]
    shared, first = (np.load(out.with_suffix(".npz"))["arr_0"][:8].astype(int) for out in (outs[0], whole))
    assert np.abs(shared - first).max() <= 1
    settings = [json.loads(out.with_suffix(".json").read_text()) for out in (outs[0], whole)]
    assert settings[0]["weights_sha256"] == settings[1]["weights_sha256"]


def test_two_processes_fail_as_one(drawing, whole):
    """The first has a reason; the second must not wait for it."""
    before = whole.with_suffix(".npz").read_bytes()
    outs = [whole, drawing.workdir.with_name("elsewhere")]
    codes = two_processes(drawing, outs, "--seed=1")
    logs = [out.with_suffix(".log").read_text() for out in outs]
    assert codes == [1, 1], logs
    assert "images made with other settings (seed was 0, now 1)" in logs[0] and "process 0 cannot write" in logs[1]
    assert whole.with_suffix(".npz").read_bytes() == before


def test_the_comparison_sees_one_bit(script, whole, tmp_path):
    other = tmp_path / "other"
    for end in (".json", ".npz", ".png"):
        other.with_suffix(end).write_bytes(whole.with_suffix(end).read_bytes())
    assert script.differences(whole, other) == []
    content = bytearray(other.with_suffix(".npz").read_bytes())
    content[1000] ^= 1
    other.with_suffix(".npz").write_bytes(content)
    other.with_suffix(".partial").mkdir()
    assert script.differences(whole, other) == [".npz", "other.partial"]


def test_the_rule_across_devices(script, whole, tmp_path):
    with np.load(whole.with_suffix(".npz")) as data:
        images, labels = data["arr_0"], data["arr_1"]
    images[3, 4, 5, 0] ^= 2
    np.savez(tmp_path / "other.npz", images, labels[::-1])
    found = script.compare(whole, tmp_path / "other")
    assert found == {"labels_equal": False, "most_levels": 2, "share_of_pixels": 1 / images.size}
    found = script.compare(whole, whole)
    assert found == {"labels_equal": True, "most_levels": 0, "share_of_pixels": 0.0} and script.within(found)
    for change in ({"labels_equal": False}, {"most_levels": 2}, {"share_of_pixels": 2e-3}):
        assert not script.within(found | change)
