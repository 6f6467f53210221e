"""Watching the other processes of a job: a lost one ends all within a minute, with one line that names it.

Without this a collective waits for a stopped process, and where one was killed it fails with a traceback that names an address.
Each process counts up its own key at jax's coordination service, which process 0 runs, and looks whether the others do.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time

from jax._src.distributed import global_state  # jax has no public way to the service's keys

SILENCE = 40.0  # seconds after which a process is lost
LOST = 75  # exit code; EX_TEMPFAIL of sysexits.h: the same command, started again, goes on

_KEY = "speedit_jax/alive"
_BEAT = 2.0  # seconds between two signs of life
_SUSPICION = 10.0  # seconds after which it is when a collective has failed already
_COLLECTIVE = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|coordination|[Bb]arrier|Connection (reset|closed)")


def leave(message: str) -> None:
    """Prints one line and exits with 75, at once: sys.exit would wait for other processes and for threads that hang."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # jax's threads, which notice now, too, would say more below the line
        # Below a progress bar; tqdm's own way would draw the bar again after the line, and wait for a lock.
        os.write(stderr, f"\nerror: {message}\n".encode())
    os._exit(LOST)


def _accepts(address: str) -> bool:
    """Whether a process listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return True
    except OSError:
        return False


class Watch:
    """Of the processes that jax.distributed.initialize joined; starts at once."""

    def __init__(self):
        self._me, self._count = global_state.process_id, global_state.num_processes
        self._over, self._ending = threading.Event(), threading.Lock()
        self._hosts = {0: global_state.coordinator_address.rpartition(":")[0]}
        self._said: dict[int, str] = {}
        self._forget()
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()
        self._take_over_aborts()

    def _forget(self) -> None:
        """All count as heard now."""
        self._answered = time.monotonic()  # when the service last did
        self._heard = dict.fromkeys(set(range(self._count)) - {self._me}, self._answered)

    def _beat(self) -> None:
        client, beats, host = global_state.client, 0, socket.gethostname()
        while True:
            beats += 1
            try:
                client.key_value_set(f"{_KEY}/{self._me}", f"{beats} {host}", allow_overwrite=True)
                found = client.key_value_dir_get(_KEY)
            except Exception:  # of the service's: it is gone, which `lost` tells by the time
                found = ()
            for key, value in found:
                self._answered, process = time.monotonic(), int(key.rpartition("/")[2])
                if self._said.get(process) != value and process != self._me:
                    self._said[process], self._hosts[process] = value, value.partition(" ")[2]
                    self._heard[process] = self._answered
            time.sleep(_BEAT)

    def _look(self) -> None:
        while not self._over.is_set():
            since = time.monotonic()
            time.sleep(1)
            if time.monotonic() - since > _SUSPICION:
                self._forget()  # this process itself was stopped for a while
            elif (process := self.lost(SILENCE)) is not None:
                self._end(process)

    def lost(self, silence: float) -> int | None:
        """The first process of which nothing was heard for `silence` seconds."""
        if self._me and time.monotonic() - self._answered > silence:
            return 0
        # Since the last answer nothing could be heard.
        return next((process for process, heard in sorted(self._heard.items()) if self._answered - heard > silence), None)

    def _end(self, process: int) -> None:
        self._ending.acquire()  # for good: several threads may come here, and one is to speak
        if not self._me:
            # The service ends with this process, which the others would miss then. Meanwhile they notice for themselves.
            time.sleep(2 * _BEAT)
        host = self._hosts.get(process, "an unknown host")
        leave(f"process {process} of {self._count} on {host} is lost; start the same command again on all hosts: it goes on")

    def blame(self, error: BaseException) -> None:
        """Ends the process if an error comes of a lost one; returns if it does not seem so, after some seconds at most."""
        if _COLLECTIVE.search(f"{error} {error.__cause__ or ''}"):
            self._await_loss()

    def _await_loss(self) -> None:
        """Ends the process as soon as another one is known to be lost; returns if none is for some seconds."""
        until = time.monotonic() + _SUSPICION + 2 * _BEAT
        while time.monotonic() < until:
            # Another one first: process 0 may have noticed that much earlier, and left.
            process = self.lost(_SUSPICION)
            if process is None and self._me and not _accepts(global_state.coordinator_address):
                process = 0
            if process is not None:
                self._end(process)
            time.sleep(0.2)

    def over(self) -> None:
        """From here on processes may end."""
        self._over.set()

    def _take_over_aborts(self) -> None:
        """When another process ends, Gloo or jax's client may abort in a thread of its own, and no exception tells of it.

        It may come early: of a process that is being killed one socket closes before the other.
        """
        # Python's own handlers run in the main thread only, and later than the abort.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._await_loss())
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
