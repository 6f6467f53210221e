"""What the commands share: running main with readable errors, and joining the other hosts."""

import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging

from speedit_jax.errors import UserError

_MULTIHOST = flags.DEFINE_bool(
    "multihost",
    False,
    "Join the other processes of this job (TPU pod, SLURM, MPI, Kubernetes: found by jax.distributed.initialize; elsewhere"
    " set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID).",
)


def _parse(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        # config_flags lets through what the config file or an override raised, wrapped in text of several lines.
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        fail(f"{first.strip()} (while reading the flags; --help lists them, configs/base.py every config key)")


def fail(message: str) -> None:
    """Prints one line and exits with 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags and runs main; a UserError becomes one line and exit code 1."""

    def guarded(argv):
        if logging.get_verbosity() == logging.INFO:
            logging.set_verbosity(logging.WARNING)  # orbax reports twenty lines a save; --verbosity=1 shows them
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        try:
            if _MULTIHOST.value:
                join()
            return main()
        except UserError as e:
            fail(str(e))

    app.run(guarded, flags_parser=_parse)


def join() -> None:
    """Makes this process one of several; their devices become one mesh."""
    import os

    if "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    else:
        jax.distributed.initialize()
