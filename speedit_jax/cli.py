"""Shared by all commands: one-line errors, and joining other hosts."""

import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TextIO

import jax
from absl import app, flags, logging
from tqdm import tqdm

from speedit_jax import object_store, peers, recipes
from speedit_jax.errors import UserError
from speedit_jax.storage import first_line, forbidden

PIXELS = "one number of pixels, or HEIGHT,WIDTH"  # what `pair` asks for where it is a size
_LAST_SECONDS = 5.0  # that a process which has failed takes to end

_MULTIHOST = flags.DEFINE_bool(
    "multihost",
    False,
    "Join the other processes of this job (TPU pod, SLURM, MPI, Kubernetes: found by jax.distributed.initialize; elsewhere"
    " set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID).",
)


def _parse(argv):
    try:
        return flags.FLAGS(recipes.expand(argv))
    except UserError as e:
        fail(str(e))
    except Exception as e:
        # absl's own errors, and whatever the config file or an override raised.
        fail(f"{_one_line(e)} (while reading the flags; see --help, and speedit_jax/config.py for every config key)")


def _one_line(error: Exception) -> str:
    """What config_flags says in many lines, of which the first tells where and the last what."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    key = isinstance(error, KeyError)
    lines = [line.strip() for line in str(error.args[0] if key else error).splitlines() if line.strip()]
    if key:
        return f"unknown config key {'. '.join(lines)}"
    if isinstance(error, OSError):
        return f"--config: {lines[-1]}"
    if isinstance(error, TypeError):
        return f"a --config.KEY names something below a value, or a value of the wrong type ({lines[-1]})"
    return " ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__


def pair(flag: flags.FlagHolder, what: str) -> tuple[int, int]:
    """The positive whole number of a flag twice, or its two.

    Raises:
      UserError: it has others; `what` says which it takes.
    """
    given = flag.value
    if not 1 <= len(given) <= 2 or not all(n.isdecimal() and int(n) for n in given):
        raise UserError(f"--{flag.name}={','.join(given)}: give {what}")
    first, second = ([int(n) for n in given] * 2)[:2]
    return first, second


def fail(message: str) -> None:
    """Prints one line and exits with 1."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    if jax.distributed.is_initialized():
        _leave_others()
    _end_soon()
    sys.exit(1)


def _without_closed_loops(hook: Callable) -> Callable:
    """For sys.unraisablehook: tensorstore reports each write that outlives the event loop of a save that has failed."""
    return lambda told: None if str(told.exc_value) == "Event loop is closed" else hook(told)


def _end_soon() -> None:
    """Python waits for threads at its end, and orbax's wait for minutes for a directory that could not be made."""
    timer = threading.Timer(_LAST_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()


def _is_cut_off(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader; it is /dev/null then, where Python's exit would say so once more."""
    poll = select.poll()
    poll.register(stream, 0)
    cut_off = any(event & select.POLLERR for _, event in poll.poll(0))
    if cut_off:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return cut_off


def _leave_others() -> None:
    """Exits with 1. sys.exit would wait for the other processes, and they perhaps for this one: five minutes, then all abort."""
    sys.stdout.flush()
    os._exit(1)


def run(main: Callable[[], int | None], saves_on_sigterm: bool = False) -> None:
    """Parses the flags and runs main; a UserError becomes one line and exit code 1.

    Args:
      saves_on_sigterm: whether main asks jax.experimental.multihost_utils if it was asked to stop.
    """

    def guarded(argv):
        if logging.get_verbosity() == logging.INFO:
            # Orbax reports every save, warns of every read, and logs as a traceback what it also raises; --verbosity=1 shows it.
            logging.set_verbosity(logging.FATAL)
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not UTF-8
        sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
        # Ctrl-C ends the process, without a traceback; train.py takes it over when there is something to save.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        watch = None
        try:
            if _MULTIHOST.value:
                join()
                watch = peers.Watch()
                if not saves_on_sigterm:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which jax has taken over
            code = main()
            sys.stdout.flush()
            if watch:
                watch.over()
            return code
        except UserError as e:
            if watch:
                watch.blame(e)
            fail(str(e))
        except Exception as e:
            if watch:
                watch.blame(e)
            if isinstance(e, BrokenPipeError) and _is_cut_off(sys.stdout):
                fail('nobody reads this command\'s output any more, as after a "| head"; write it to a file')
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                fail(f"{e.strerror}; free some disk space and run the same command again")
            if isinstance(e, PermissionError) and e.filename:
                fail(str(forbidden(e.filename, e)))
            if problem := object_store.failure(e):
                fail(problem)
            if isinstance(e, OSError) and e.filename and e.strerror:
                fail(f"{e.filename}: {e.strerror}; mend it and run the same command again")
            if jax.distributed.is_initialized():
                traceback.print_exc()
                _leave_others()
            _end_soon()
            raise

    app.run(guarded, flags_parser=_parse)


def join() -> None:
    """Makes this process one of several; their devices become one mesh.

    Raises:
      UserError: the environment does not say which processes these are, or they cannot be reached.
    """
    try:
        if "JAX_NUM_PROCESSES" in os.environ:
            jax.distributed.initialize(
                num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
            )
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError, RuntimeError) as e:
        raise UserError(f"--multihost: {first_line(e)}; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID") from e
