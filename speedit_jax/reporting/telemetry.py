"""What a run reports: metrics.jsonl, TensorBoard, W&B, a progress bar.

metrics.jsonl holds one JSON object a line: {"step": n, "loss": ..., ..., "time_...": ...}. Fields that start with
`time_` depend on the clock; all others are the same whenever the run is repeated, killed or not. A number that is not finite is
null.
"""

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from speedit_jax.reporting.tensorboard import TensorBoard
from speedit_jax.reporting.wandb_board import WandbBoard
from speedit_jax.storage import Mirror, fetched, make_directory, write_text

T = TypeVar("T")

# Dense bfloat16 FLOP/s of one device, by the vendors' data sheets; the names are JAX's device_kind.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}

_SHOW_EVERY = 30.0  # seconds between two flushes of TensorBoard's file, and two uploads of it and metrics.jsonl

_QUARTER = re.compile(r"_q[1-4]$")


class Profiler:
    """A trace of `steps` steps from step `first` on (0 is never), for TensorBoard's profile plugin and for Perfetto."""

    def __init__(self, workdir: Path, first: int, steps: int):
        self._mirror, self._first, self._last = Mirror(workdir / "tensorboard"), first, first + steps
        self._running = False

    def before(self, step: int) -> None:
        """Call before step number `step` (from 0)."""
        if self._first and step == self._first:
            jax.profiler.start_trace(str(self._mirror.directory))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """Call when `step` steps are taken, with what the last returned."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._running:
            jax.profiler.stop_trace()
            self._mirror.update()
            self._running = False


class Telemetry:
    """The writers of one run; only process 0 writes.

    Args:
      workdir: of the run.
      first_step: the step the run starts from: what was logged beyond it, by a run killed after its last checkpoint,
        is taken back, because the same steps are run and logged again.
      num_steps: of the whole run.
      batch_size: images a step.
      mfu_per_image: model FLOPs of an image's step over the devices' peak in a second; None where the peak is unknown.
      started: time.perf_counter() when this process began to work; None is now.
      wandb: a further writer.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        mfu_per_image: float | None = None,
        started: float | None = None,
        wandb: WandbBoard | None = None,
    ):
        self._active = jax.process_index() == 0
        self._batch_size = batch_size
        self._mfu_per_image = mfu_per_image
        self._wandb = wandb
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._step = first_step
        self._clock: tuple[int, float] | None = None  # the run's step and the time at the last reading
        self._seconds: float | None = None  # per step, at the last reading that knew
        self._data_seconds = 0.0  # the same, of waiting for data
        self._paused = 0.0
        self._waited = 0.0  # for data, since the last reading
        self._started = time.perf_counter() if started is None else started
        self._first_step, self._unread = first_step, 0  # unread: steps whose time the compilation hides
        self._spent = _Spent()
        if not self._active:
            return
        make_directory(workdir)
        self._mirror = Mirror(workdir)
        path = self._mirror.directory / "metrics.jsonl"
        self._spent = _truncate(workdir / "metrics.jsonl", path, first_step)
        self._file = path.open("a")
        self._board = TensorBoard(self._mirror.directory / "tensorboard", first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, the time until each is there taken down."""
        batches = iter(batches)
        while True:
            since = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - since
            yield batch

    def step(self, step: int) -> None:
        """Counts it and moves the bar: call once a step."""
        self._step = step
        if self._active:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, jax.Array]) -> dict[str, float] | None:
        """Hands over the metrics of a step, and writes those handed over before, which the device has finished.

        Returns:
          What was written, with its step, or None. Reading a value waits for the device: one hand-over late, the wait is over.
        """
        try:
            return self._write()
        finally:  # also where it fails, or `close` would not know of them, and a checkpoint of this step lack its line
            self._pending = (step, values)

    def also(self, values: dict[str, float]) -> None:
        """More numbers of the step whose metrics were handed over last, for its line."""
        step, pending = self._pending
        self._pending = (step, pending | values)

    def flush(self) -> dict[str, float] | None:
        """Writes what is pending, waiting for the device; call before anything that a resumed run starts from."""
        written = self._write()
        if self._active:
            self._board.flush()
            self._mirror.update()
        return written

    def _write(self) -> dict[str, float] | None:
        if self._pending is None:
            return None
        step, values = self._pending
        self._pending = None
        values = {name: float(value) for name, value in values.items()}
        # A batch without timesteps of some quarter of the schedule has no loss there.
        values = {name: value for name, value in values.items() if not (_QUARTER.search(name) and math.isnan(value))}
        now = time.perf_counter() - self._paused
        if self._clock is not None and self._step > self._clock[0]:
            steps = self._step - self._clock[0]
            self._seconds, self._data_seconds = (now - self._clock[1]) / steps, self._waited / steps
            self._spent.useful += (steps + self._unread) * (self._seconds - self._data_seconds)
            self._unread = 0
        elif self._clock is None:
            self._unread = self._step - self._first_step
        if self._seconds is not None:
            values |= {
                "time_per_step": self._seconds,
                "time_images_per_second": self._batch_size / self._seconds,
                "time_waiting_for_data": self._data_seconds,
                "time_paused": self._paused,
                "time_total": self._spent.total + time.perf_counter() - self._started,
            }
            values["time_goodput"] = self._spent.useful / values["time_total"]
            if self._mfu_per_image:
                values["time_mfu"] = self._mfu_per_image * self._batch_size / self._seconds
        self._clock, self._waited = (self._step, now), 0.0
        if self._active:
            # JSON has no NaN and no infinity; most programs that read it stop there.
            stored = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **stored}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.scalar(name, value, step)
            if self._wandb:
                self._wandb.scalars(step, values)
            shown = {"loss": f"{values['loss']:.4f}"}
            if "time_images_per_second" in values:
                shown["images/s"] = f"{values['time_images_per_second']:.0f}"
            if values.get("skipped"):
                shown["skipped"] = f"{values['skipped']:.0f}"
            self._bar.set_postfix(shown)
            self._board.flush(_SHOW_EVERY)
            self._mirror.update(_SHOW_EVERY)
        return {"step": step} | values

    def grid(self, step: int, grid: np.ndarray, path: Path) -> None:
        """Shows a grid of samples, uint8 [H, W, C] and the PNG file `path`, on the boards."""
        if not self._active:
            return
        self._board.image("samples", grid[..., :3] if grid.shape[-1] >= 3 else grid[..., :1], step)
        if self._wandb:
            self._wandb.image(step, fetched(path))

    def paused(self, since: float) -> None:
        """Leaves the time from `since` (time.perf_counter()) to now out of the throughput."""
        self._paused += time.perf_counter() - since

    def say(self, line: str | None) -> None:
        """Prints above the bar, if there is a line."""
        if self._active and line:
            self._bar.write(line)

    def close(self) -> None:
        with contextlib.ExitStack() as last_first:  # each is closed, whatever fails
            if self._active:
                last_first.callback(self._mirror.update)
                last_first.callback(self._file.close)
                if self._wandb:
                    last_first.callback(self._wandb.close)
                last_first.callback(self._board.close)
                last_first.callback(self._bar.close)
            last_first.callback(self.flush)


@dataclasses.dataclass
class _Spent:
    """Seconds of a run's processes so far: in all, and on the steps that its checkpoint holds."""

    total: float = 0.0
    useful: float = 0.0


def _truncate(path: Path, to: Path, last_step: int) -> _Spent:
    """Writes metrics.jsonl without the lines beyond a step, and those that a kill cut short or that are damaged.

    Returns:
      What was spent: in all, with the lines dropped, whose steps are taken again.
    """
    spent = _Spent()
    if not path.exists():
        return spent
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines(keepends=True):
        try:
            record: dict[str, Any] = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            continue
        spent.total = record.get("time_total", spent.total)
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
            spent.useful = record["time_goodput"] * spent.total if "time_goodput" in record else spent.useful
    write_text(to, "".join(kept))
    return spent
