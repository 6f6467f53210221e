"""Eight CPU devices for every test; must run before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest
from absl import flags
from commands import server

# grain's worker code reads absl flags, which no app.run parses here.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def run():
    """run(command, *flags, xla_flags="") -> commands.Result."""
    with server() as run:
        yield run
