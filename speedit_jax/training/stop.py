"""Stopping a run between two steps, so that nothing is lost."""

import ctypes
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

INTERRUPTED = 130  # exit code of a run that was asked to stop and can be resumed


class Stop:
    """Whether the run was asked to stop: by Ctrl-C or SIGTERM on one host, by the scheduler's notice on several."""

    def __init__(self):
        self._asked = False
        if jax.process_count() > 1:
            return  # jax's coordinator catches SIGTERM, and tells all processes
        signals, write = os.pipe()
        os.set_blocking(write, False)
        # Python's own handlers run in the main thread only, when what it computes (a compilation, say) is over.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(signals,), daemon=True).start()

    def _listen(self, signals: int) -> None:
        while True:
            (number,) = os.read(signals, 1)
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self._asked:
                ctypes.CDLL(None).signal(number, None)  # ends the process; signal.signal is for the main thread
                os.kill(os.getpid(), number)
            self._asked = True
            print(f"\n{signal.Signals(number).name}: saving after this step; repeat to stop at once without saving", flush=True)

    def __call__(self, step: int) -> bool:
        # On several hosts all must stop after the same step: jax's coordinator picks it.
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
