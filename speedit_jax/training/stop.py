"""Stopping a run between two steps, so that nothing is lost."""

import signal

import jax
from jax.experimental import multihost_utils

INTERRUPTED = 130  # exit code of a run that was asked to stop and can be resumed


class Stop:
    """Whether the run was asked to stop: by Ctrl-C or SIGTERM on one host, by the scheduler's notice on several."""

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        del frame
        self._asked = True
        # A second signal ends the process at once, even in the middle of a compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving after this step; repeat to stop at once without saving", flush=True)

    def __call__(self, step: int) -> bool:
        # On several hosts all must stop after the same step: jax's coordinator, which also catches SIGTERM, picks it.
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
