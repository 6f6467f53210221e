"""Eight CPU devices for every test; `-m tpu` and `-m gpu` run on the accelerator that is there.

Most of the time would go to compilation: what XLA has compiled is kept in pytest's cache, for tests and commands that compile
the same, and CPUs compile without optimisation unless SPEEDIT_DEFAULT_COMPILATION=1 (tests/commands.py).
"""

import os
import subprocess
from pathlib import Path

import pytest
from absl import flags

ACCELERATORS = ("tpu", "gpu")
# The files that take longest. They start first, so that at the end of a parallel run no core waits for the others; xdist's
# --dist loadfile keeps that order with --no-loadscope-reorder.
LONG = ("test_multihost", "test_kill_resume", "test_sample_resume", "test_gradients", "test_build", "test_step")

# grain's worker code reads absl flags, which no app.run parses here.
flags.FLAGS.mark_as_parsed()


def pytest_configure(config):
    """Before jax is imported, which the test files do."""
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("xla"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    from commands import COMPILATION, EIGHT_DEVICES, without_waiting  # a module that takes the environment as it is now

    os.fsync = without_waiting
    if config.option.markexpr not in ACCELERATORS:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{COMPILATION} {EIGHT_DEVICES} {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


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
    from commands import server

    with server() as run:
        yield run


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory) -> Path:
    """The directory of a finished run, for tests that leave it as it is."""
    from commands import TINY, assert_works

    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = run("train", *TINY, f"--workdir={workdir}", "--config.training.sample_every=6", "--config.evaluation.every=3")
    assert_works(result)
    assert f"python -m speedit_jax.sample --workdir={workdir}" in result.out
    return workdir


@pytest.fixture
def small_disk(tmp_path):
    """(an empty file system of 1 MiB, a function that sets its size in KiB)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"needs the right to mount a tmpfs: {e}")
    yield disk, lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
