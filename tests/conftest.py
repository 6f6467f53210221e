"""Eight CPU devices for every test; `-m tpu` and `-m gpu` run on the accelerator that is there."""

import os

import pytest
from absl import flags
from commands import server

ACCELERATORS = ("tpu", "gpu")

# grain's worker code reads absl flags, which no app.run parses here.
flags.FLAGS.mark_as_parsed()


def pytest_configure(config):
    """Before jax is imported, which the test files do."""
    if config.option.markexpr not in ACCELERATORS:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session", autouse=True)
def accelerator(request):
    """On a machine without it, `-m gpu` would run on the CPU and prove nothing."""
    wanted = request.config.option.markexpr
    if wanted in ACCELERATORS:
        import jax

        if jax.default_backend() != wanted:
            pytest.exit(f"-m {wanted}: JAX finds {jax.devices()} here, and no {wanted}", returncode=1)


@pytest.fixture(scope="session")
def run():
    """run(command, *flags, xla_flags="") -> commands.Result."""
    with server() as run:
        yield run
