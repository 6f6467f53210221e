"""A run is asked to stop while its main thread computes, as in a compilation, and hears of no signal."""

import os
import signal
import subprocess
import sys

import pytest
from commands import own_lines

BUSY = """
import hashlib
from speedit_jax.training.stop import Stop
stop = Stop()
assert not stop(1)
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", int(ROUNDS))
print("asked" if stop(2) else "not asked")
"""


def busy(rounds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", f"ROUNDS = {rounds}\n{BUSY}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_at_once_and_the_second_ends_the_process(sent):
    process = busy(2e9)  # half an hour
    try:
        process.send_signal(sent)
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline().startswith(f"{sent.name}: saving after this step; repeat to stop at once")
        process.send_signal(sent)
        said, errors = process.communicate(timeout=100)
        assert (process.returncode, said, own_lines(errors)) == (-sent, "", "")
    finally:
        process.kill()
        process.communicate()


def test_after_one_signal_the_step_is_finished():
    process = busy(3e5)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    assert (process.returncode, said.splitlines()[-1]) == (0, "asked"), errors
