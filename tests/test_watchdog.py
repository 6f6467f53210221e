"""Processes that hang, and processes that only look as if they did."""

import os
import signal
import subprocess
import sys
import time

import pytest

from speedit_jax.peers import LOST

PROLOGUE = """
import os, sys, threading, time
from speedit_jax.watchdog import Watchdog
watchdog = Watchdog(float(sys.argv[1]))
watchdog.start()
"""
# Batches from a pipe into which nobody writes: read() never returns.
STUCK = """
def batches():
    yield 0
    os.read(os.pipe()[0], 1)
for batch in watchdog.waiting_for(batches()):
    print("batch", batch, flush=True)
"""
WORKS = """
for _ in watchdog.waiting_for(range(40)):
    time.sleep(0.05)
print("done")
"""
STOPPED = """
print("ready", flush=True)
sys.stdin.readline()
print("done")
"""


def process(code: str, limit: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROLOGUE + code, str(limit)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, **pipes)


def test_a_hang_ends_with_every_stack_and_a_line():
    hung = process(STUCK, 0.5)
    said, errors = hung.communicate(timeout=100)
    assert hung.returncode == LOST and said == "batch 0\n"
    *stacks, line = errors.strip().splitlines()
    assert any("in batches" in stack for stack in stacks), errors  # where it hangs
    assert sum("hread 0x" in stack for stack in stacks) >= 2  # and what the others do
    assert line.startswith("error: nothing has happened for")
    assert "while waiting for data" in line and "training.hang_after" in line


@pytest.mark.parametrize(("code", "limit"), [(WORKS, 0.5), ("time.sleep(2); print('done')", 0)])
def test_work_goes_on(code, limit):
    working = process(code, limit)
    said, errors = working.communicate(timeout=100)
    assert (working.returncode, said) == (0, "done\n"), errors


def test_a_process_that_was_stopped_for_a_while_goes_on():
    stopped = process(STOPPED, 4)
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(6)
    stopped.send_signal(signal.SIGCONT)
    said, errors = stopped.communicate("\n", timeout=100)
    assert (stopped.returncode, said) == (0, "done\n"), errors
