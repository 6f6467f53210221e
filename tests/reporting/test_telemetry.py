"""What a run writes down: metrics.jsonl, TensorBoard, grids, curves."""

import errno
import json
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from speedit_jax.reporting.curves import read_metrics, write_curves
from speedit_jax.reporting.telemetry import Telemetry
from speedit_jax.reporting.tensorboard import TensorBoard


def telemetry(workdir, first_step=0):
    return Telemetry(workdir, first_step=first_step, num_steps=10, batch_size=4)


def values(step):
    return {"loss": jnp.float32(step / 2), "skipped_in_a_row": jnp.int32(0)}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir):
    return [record["step"] for record in lines(workdir)]


def events(workdir):
    """Every event of a run's TensorBoard files: records of a length, its checksum, the message, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_metrics_are_written_one_hand_over_late(tmp_path):
    t = telemetry(tmp_path)
    assert t.metrics(1, values(1)) is None
    assert steps(tmp_path) == []
    assert t.metrics(2, values(2)) == {"step": 1, "loss": 0.5, "skipped_in_a_row": 0.0}
    assert steps(tmp_path) == [1]
    assert t.flush()["loss"] == 1.0
    assert steps(tmp_path) == [1, 2]
    assert t.flush() is None
    t.metrics(3, values(3))
    t.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert [record["loss"] for record in lines(tmp_path)] == [0.5, 1.0, 1.5]


def test_a_write_that_fails_once_loses_no_step(tmp_path, monkeypatch):
    """As on a full disk where removing a checkpoint then makes room: the step is saved, so its line must be there."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    t = telemetry(tmp_path)
    t.metrics(1, values(1))
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(TensorBoard, "scalar", full)
        t.metrics(2, values(2))
    t.close()
    assert steps(tmp_path) == [1, 2]


def test_more_numbers_of_a_step_are_in_its_line(tmp_path):
    t = telemetry(tmp_path)
    for step in (1, 2):
        t.metrics(step, values(step))
    t.also({"eval_fid": 0.25})
    t.close()
    assert [record.get("eval_fid") for record in lines(tmp_path)] == [None, 0.25]
    scalars = {(v.tag, e.step): v.simple_value for e in events(tmp_path) for v in e.summary.value if v.HasField("simple_value")}
    assert scalars[("eval_fid", 2)] == 0.25 and ("eval_fid", 1) not in scalars
    assert scalars[("loss", 2)] == 1.0


def test_time_fields_are_marked(tmp_path):
    t = Telemetry(tmp_path, first_step=0, num_steps=10, batch_size=4, mfu_per_image=1e-4)
    for step in t.waiting_for((2, 4, 6)):
        t.step(step)
        t.metrics(step, values(step))
    t.close()
    first, *later = lines(tmp_path)
    # There is no time before the first record to divide by.
    assert set(first) == {"step", "loss", "skipped_in_a_row"}
    for record in later:
        times = {"time_per_step", "time_images_per_second", "time_waiting_for_data", "time_paused", "time_mfu"}
        times |= {"time_total", "time_goodput"}
        assert set(record) - set(first) == times
        assert record["time_images_per_second"] == pytest.approx(4 / record["time_per_step"])
        assert record["time_mfu"] == pytest.approx(1e-4 * record["time_images_per_second"])


def test_waiting_for_data_and_pauses_are_told_apart(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    t = telemetry(tmp_path)

    def batches():
        nonlocal now
        for step in range(1, 5):
            now += 0.25
            yield step

    for step in t.waiting_for(batches()):
        now += 1.0  # the step itself
        t.step(step)
        t.metrics(step, values(step))
        since = now
        now += 10.0  # a checkpoint
        t.paused(since)
    t.close()
    assert lines(tmp_path)[-1]["time_waiting_for_data"] == pytest.approx(0.25)
    assert lines(tmp_path)[-1]["time_per_step"] == pytest.approx(1.25)
    assert lines(tmp_path)[-1]["time_paused"] == pytest.approx(40)


def test_throughput_does_not_depend_on_when_metrics_are_read(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    t = telemetry(tmp_path)
    for step in range(1, 13):
        now += 0.5  # a step
        t.step(step)
        if step % 4 == 0:
            t.metrics(step, values(step))
        if step == 5:  # saving, between two records
            t.flush()
            since = now
            now += 100
            t.paused(since)
    t.close()
    assert steps(tmp_path) == [4, 8, 12]
    assert [record.get("time_per_step") for record in lines(tmp_path)] == [None, 0.5, 0.5]


EARLIER = [
    {"step": 2, "time_total": 30.0, "time_goodput": 0.1},
    {"step": 4, "time_total": 40.0, "time_goodput": 0.1},
    {"step": 5},
    {"step": 6, "time_total": 60.0, "time_goodput": 0.1},
]


@pytest.mark.parametrize("resumed", [False, True])
def test_goodput_counts_no_step_twice(tmp_path, monkeypatch, resumed):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    first = 4 if resumed else 0
    if resumed:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in EARLIER) + '{"step": 7, "tim')
    t = Telemetry(tmp_path, first_step=first, num_steps=20, batch_size=4, started=90)

    def batches():
        nonlocal now
        for step in range(first + 1, first + 9):
            now += 0.25
            yield step

    for step in t.waiting_for(batches()):
        now += 21.0 if step == first + 1 else 1.0  # twenty of them are the compilation's
        t.step(step)
        if step % 2 == 0:
            t.metrics(step, values(step))
        if step == first + 6:
            since = now
            now += 10.0
            t.paused(since)
    t.close()
    last = lines(tmp_path)[-1]
    total = 10 + 20 + 8 * 1.25 + 10
    # Of the 60 seconds before, those of four steps are not lost: a tenth of the 40 until then.
    assert last["time_total"] == pytest.approx(total + 60 * resumed)
    assert last["time_goodput"] * last["time_total"] == pytest.approx(8 + 4 * resumed)
    assert [record["step"] for record in lines(tmp_path)] == [2, 4, 6, 8] + [10, 12] * resumed


def test_not_finite_values_are_null(tmp_path):
    """Python's json reads NaN, and hardly anything else does."""
    t = telemetry(tmp_path)
    t.metrics(1, values(1) | {"loss": jnp.float32(np.nan), "grad_norm": jnp.float32(np.inf)})
    t.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "skipped_in_a_row": 0.0, "grad_norm": None}
    assert np.isnan(read_metrics(tmp_path)["loss"][1]).all()


def test_a_quartile_without_a_loss_is_left_out(tmp_path):
    t = telemetry(tmp_path)
    t.metrics(1, values(1) | {"mse_q1": jnp.float32(2), "mse_q4": jnp.float32(np.nan), "loss_q4": jnp.float32(np.nan)})
    t.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "skipped_in_a_row": 0.0, "mse_q1": 2.0}]


@pytest.mark.parametrize(
    "tail",
    [
        "",
        '{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n',
        '{"step": 4, "lo',
        '{"step": 3, "loss": 1.0}',  # whole, but for the end of the line
        "\0" * 20,  # what a file system may leave of a line that was being written
    ],
    ids=["nothing", "later steps", "half a line", "no newline", "zeros"],
)
def test_resuming_takes_back_what_will_be_logged_again(tmp_path, tail):
    whole = "".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(whole + tail)
    t = telemetry(tmp_path, first_step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    t.metrics(4, values(4))
    t.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("damaged", [b"\xff" * 9 + b"\n", b'{"step" 2}\n', b'["step"]\n', b'{"stop": 2}\n'], ids=repr)
def test_resuming_loses_no_line_but_the_damaged_one(tmp_path, damaged):
    one, three = (f'{{"step": {step}, "loss": 2.0}}\n'.encode() for step in (1, 3))
    (tmp_path / "metrics.jsonl").write_bytes(one + damaged + three)
    telemetry(tmp_path, first_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == one + three


def test_resuming_before_everything_logged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    telemetry(tmp_path).close()
    assert steps(tmp_path) == []


def test_the_bar_counts_from_the_first_step(tmp_path, capsys):
    t = telemetry(tmp_path, first_step=4)
    t.step(5)
    t.say("a line")
    t.step(10)
    t.close()
    out = capsys.readouterr()
    assert "4/10" in out.err and "10/10" in out.err
    assert out.out == "a line\n"


def test_tensorboard_holds_scalars_and_the_grid(tmp_path):
    t = telemetry(tmp_path, first_step=2)
    for step in (3, 4, 5):
        t.step(step)
        t.metrics(step, values(step))
    grid = np.random.default_rng(0).integers(0, 256, (17, 17, 3)).astype(np.uint8)
    t.grid(4, grid, tmp_path / "samples" / "a.png")
    t.close()
    found = events(tmp_path)
    scalars = {(v.tag, e.step): v.simple_value for e in found for v in e.summary.value if v.HasField("simple_value")}
    assert scalars[("loss", 3)] == 1.5 and scalars[("loss", 4)] == 2.0
    assert ("skipped_in_a_row", 4) in scalars and ("time_per_step", 4) in scalars
    pictures = [(v.tag, e.step, v.image) for e in found for v in e.summary.value if v.HasField("image")]
    assert [(tag, step) for tag, step, _ in pictures] == [("samples", 4)]
    assert (pictures[0][2].height, pictures[0][2].width, pictures[0][2].colorspace) == (17, 17, 3)
    # A board that shows steps 3 and on of a run that was killed is told to drop them.
    assert [e.step for e in found if e.HasField("session_log")] == [3]


FULL = """
import pathlib, resource, sys
from speedit_jax.reporting.telemetry import Telemetry

telemetry = Telemetry(pathlib.Path(sys.argv[1]), first_step=0, num_steps=100, batch_size=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow further, as on a full disk
try:
    for step in range(1, 101):
        telemetry.metrics(step, {"loss": 1.0})
except OSError as e:
    print(f"training: {e}")
try:
    telemetry.close()
except OSError as e:
    print(f"closing: {e}")
"""


def test_a_full_disk_is_an_error_of_the_caller_and_of_nothing_after_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == "training: [Errno 27] File too large\nclosing: [Errno 27] File too large\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("losses, scale", [([0.5, 0.25], "log"), ([0.5, None], "log"), ([0.5, -0.25], "linear")])
def test_a_loss_below_zero_is_drawn(tmp_path, monkeypatch, losses, scale):
    """A logarithmic axis has no place for it, and the curve would end there."""
    records = [json.dumps({"step": step, "loss": loss, "mse": 1.0}) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(records))
    scales = []
    monkeypatch.setattr(pyplot, "close", lambda figure: scales.extend(axis.get_yscale() for axis in figure.axes))
    write_curves(tmp_path)
    assert scales == [scale, "log"]


def test_a_curve_of_one_value_is_a_dot(tmp_path, monkeypatch):
    """A line through one value draws nothing."""
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "heldout_mse": 0.2}, {"step": 3, "loss": 0.7, "vb": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    markers = {}
    monkeypatch.setattr(
        pyplot, "close", lambda figure: markers.update((a.get_title(), a.lines[0].get_marker()) for a in figure.axes if a.lines)
    )
    write_curves(tmp_path)
    assert markers == {"loss": "", "heldout mse": ".", "vb": ""}


def test_curves(tmp_path):
    t = telemetry(tmp_path)
    t.close()
    assert write_curves(tmp_path) is None
    for first in (0, 2):
        t = telemetry(tmp_path, first_step=first)
        for step in (first + 1, first + 2):
            t.metrics(step, values(step))
        t.close()
    assert write_curves(tmp_path) == tmp_path / "curves.png"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 10
        without = np.asarray(image)
    records = [json.dumps(record | {"eval_fid": record["loss"]}) for record in lines(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(records))
    write_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        assert (np.asarray(image) != without).any(), "evaluations have a curve"
    (tmp_path / "metrics.jsonl").write_text("\n".join(records).replace("eval_fid", "another"))
    write_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        np.testing.assert_array_equal(np.asarray(image), without)
