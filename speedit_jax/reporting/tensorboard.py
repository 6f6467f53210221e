"""TensorBoard's event files.

tensorboardX's SummaryWriter writes them in a thread. Where that thread cannot write it dies unseen, and after ten more events the
run waits for it for good. Here the calling thread writes, so a failure is an OSError of the call.
"""

import math
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from speedit_jax.storage import make_directory


class TensorBoard:
    """A new event file in `directory`. TensorBoard drops what earlier files hold of `first_step` and later steps.

    All methods raise OSError where the file cannot be written.
    """

    def __init__(self, directory: Path, first_step: int):
        make_directory(directory)
        self._events = EventsWriter(str(directory / "events"))
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))
        self._flushed = -math.inf
        self.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, summary=summary.scalar(name, value))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """uint8 [H, W, 1 or 3]."""
        self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def _add(self, step: int, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def flush(self, every: float = 0.0) -> None:
        """Writes what is buffered to the disk, unless that was done less than `every` seconds ago."""
        if time.monotonic() - self._flushed >= every:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()
