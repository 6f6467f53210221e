"""One trainer at a time in a workdir, and a lock that no kill leaves closed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from speedit_jax.errors import UserError
from speedit_jax.training import lock

HOLD = """
import sys, time
from pathlib import Path
from speedit_jax.training import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_is_there_while_held_and_gone_afterwards(tmp_path):
    with lock.held(tmp_path / "a" / "b"):
        owner = json.loads((tmp_path / "a" / "b" / lock.NAME).read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert names(tmp_path / "a") == [], "what was made for it goes"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError), lock.held(tmp_path):
        raise ValueError
    assert names(tmp_path) == ["a", "file"]


def test_a_second_start_is_refused_in_one_line(tmp_path, other):
    run = tmp_path / "run"
    message = rf"process {other.pid} on {socket.gethostname()} trains in {run}; wait for it, stop it, or name another --workdir"
    with pytest.raises(UserError, match=message) as error, lock.held(run):
        pass
    assert "\n" not in str(error.value)
    assert names(run) == [lock.NAME] and json.loads((run / lock.NAME).read_text())["pid"] == other.pid


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_succeeded_at_once(tmp_path, other, reaped):
    other.send_signal(signal.SIGKILL)
    if reaped:
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie
    with lock.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_another_process_with_the_owners_number(tmp_path):
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}
    (tmp_path / lock.NAME).write_text(json.dumps(owner))
    with lock.held(tmp_path):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"host": "a', "[]"])
def test_a_lock_that_a_kill_left_half_written(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock of an owner on another host."""
    monkeypatch.setattr(lock, "_LOOK_EVERY", 0.01)
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1"}))
    return path


def test_an_owner_on_another_host_that_marks_the_lock(elsewhere):
    done = threading.Event()

    def mark():
        while not done.wait(0.02):
            os.utime(elsewhere)

    thread = threading.Thread(target=mark)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere trains in"), lock.held(elsewhere.parent):
            pass
    finally:
        done.set()
        thread.join()


def test_an_owner_on_another_host_that_is_gone(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WATCH", 0.1)
    with lock.held(elsewhere.parent):
        assert json.loads(elsewhere.read_text())["pid"] == os.getpid()
    assert f"Looking if process 7 on elsewhere still trains in {elsewhere.parent}" in capsys.readouterr().out


def test_it_is_marked_while_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "MARK_EVERY", 0.01)
    with lock.held(tmp_path):
        os.utime(tmp_path / lock.NAME, (0, 0))
        while (tmp_path / lock.NAME).stat().st_mtime == 0:
            time.sleep(0.01)


def test_a_lock_that_another_took_over_stays(tmp_path):
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).write_text('{"host": "elsewhere"}')
    assert names(tmp_path) == [lock.NAME]


START_TOGETHER = """
import sys
from pathlib import Path
from speedit_jax.errors import UserError
from speedit_jax.training import lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""


def test_of_several_that_start_together_one_holds_it(tmp_path):
    """With a dead owner's lock in the way, which all would take over."""
    (tmp_path / lock.NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1"}))
    command = [sys.executable, "-c", START_TOGETHER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(4)]
        assert {process.stdout.readline() for process in processes} == {"ready\n"}
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        assert sorted(process.stdout.readline() for process in processes) == ["held\n"] + ["refused\n"] * 3


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write to --workdir={tmp_path}/file/run"), lock.held(tmp_path / "file" / "run"):
        pass
