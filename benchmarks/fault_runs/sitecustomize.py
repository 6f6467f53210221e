"""Python imports this at its start, in the processes of a trial: all of them keep what XLA has compiled.

Of several processes JAX lets the first alone write its cache, and on CPUs each has keys of its own, so the others would compile
again in every trial: two fifths of what a start of two processes costs.
"""

import os

if os.environ.get("JAX_PROCESS_ID", "0") != "0":
    from unittest import mock

    from jax._src import compiler

    write = compiler._cache_write

    def write_as_the_first(*args):
        with mock.patch.object(compiler.distributed.global_state, "process_id", 0):
            write(*args)

    compiler._cache_write = write_as_the_first
