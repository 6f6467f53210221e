"""Ending a process that hangs: a collective that never ends, a data source that never answers, storage that blocks.

A hung job costs as much as a working one, and no scheduler restarts a process that is alive.
"""

import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from speedit_jax.peers import leave

T = TypeVar("T")


class Watchdog:
    """Ends the process, with exit code 75 and the stack of every thread, when nothing has happened for `limit` seconds.

    Args:
      limit: seconds; longer than the longest thing that is done without a sign of life: compiling, a save, a batch of
        samples, as many steps as are dispatched before the device is waited for. 0 never ends it.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._over = threading.Event()

    def alive(self, doing: str) -> None:
        """Something has happened; `doing` comes next."""
        self._seen, self._doing = time.monotonic(), doing

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; each is a sign of life."""
        batches = iter(batches)
        while True:
            self.alive("waiting for data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.alive("training")
            yield batch

    def start(self) -> None:
        """Watches until `stop`, or the end of the process."""
        self.alive("starting")
        if self._limit:
            threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _look(self) -> None:
        interval = min(5.0, self._limit / 4)
        while True:
            since = time.monotonic()
            if self._over.wait(interval):
                return
            now = time.monotonic()
            if now - since > 2 * interval:
                self._seen = now  # the process itself was stopped for a while
            elif now - self._seen > self._limit:
                self._end(now - self._seen)

    def _end(self, silent: float) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        leave(
            f"nothing has happened for {silent:,.0f} seconds on {socket.gethostname()}, while {self._doing}; the stack of every"
            " thread is above; start the same command again on all hosts: it goes on (training.hang_after)"
        )
