"""What the launch scripts do with real processes: their exit codes, and those of a slice that the test's `gcloud` plays here."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SECONDS = 60  # for what takes a moment


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(cwd: Path, name: str, *flags: str, **env: str) -> str:
    done = subprocess.run([LAUNCH / name, *flags], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout


def wait(condition) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def status(cwd: Path) -> str:
    return run(cwd, "detached.sh", "status").strip()


def test_detached_run(tmp_path):
    assert status(tmp_path) == "none"
    run(tmp_path, "detached.sh", "run", "--", "bash", "-c", "echo 'it runs'; until [ -e go ]; do sleep 0.1; done; exit 3")
    assert status(tmp_path) == "running"
    again = subprocess.run([LAUNCH / "detached.sh", "run", "--", "true"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "already runs here" in again.stderr
    (tmp_path / "go").touch()
    wait(lambda: status(tmp_path) == "3")
    assert run(tmp_path, "detached.sh", "logs") == "it runs\n"


def test_the_number_of_another_process_is_no_run(tmp_path):
    """As after the machine has started again: here it is the number of the tests."""
    (tmp_path / ".launch/run").mkdir(parents=True)
    (tmp_path / ".launch/run/pid").write_text(f"{os.getpid()}\n")
    assert status(tmp_path) == "137"
    run(tmp_path, "detached.sh", "run", "--", "true")
    wait(lambda: status(tmp_path) == "0")


def test_stop_waits_for_what_is_saved(tmp_path):
    code = "trap 'sleep 1; touch saved; exit 130' TERM; touch started; while :; do sleep 0.1; done"
    run(tmp_path, "detached.sh", "run", "--restart", "--", "bash", "-c", code)
    wait((tmp_path / "started").exists)
    run(tmp_path, "detached.sh", "stop")
    wait(lambda: status(tmp_path) == "stopped")
    assert (tmp_path / "saved").exists() and (tmp_path / ".launch/run/exit").read_text() == "130\n"


def test_restart_after_75_alone(tmp_path):
    command = "echo >>starts; (($(wc -l <starts) < 3)) && exit 75; exit 1"
    run(tmp_path, "detached.sh", "run", "--restart", "--", "bash", "-c", command)
    wait(lambda: status(tmp_path) == "1")
    assert (tmp_path / "starts").read_text().count("\n") == 3


# `srun` of the test: two tasks of which the second ends with the code in FIRST at the first start, and the other one with 75 if
# that is not 0; as SLURM's, it gives the highest.
SRUN = """
until [[ $1 == bash ]]; do shift; done
"$@" & one=$!
PEER=1 "$@" & two=$!
wait $one; a=$?
wait $two; b=$?
exit $((a > b ? a : b))
"""
TASK = 'if [[ ${PEER:-} ]]; then exit "$FIRST"; elif ((FIRST)); then exit 75; fi'


@pytest.mark.parametrize(
    ("code", "restarts", "seconds", "expected", "requeued"),
    [
        (0, 0, 0, 0, False),
        (1, 0, 0, 1, False),
        (75, 99, 0, 75, True),
        (130, 99, 0, 130, True),
        (137, 9, 0, 137, True),
        (137, 10, 0, 137, False),
        (137, 99, 600, 137, True),
    ],
)
def test_slurm_job_comes_back_unless_it_is_complete_or_mistaken(tmp_path, code, restarts, seconds, expected, requeued):
    for name, text in {"srun": SRUN, "python": TASK, "scontrol": "echo scontrol $@"}.items():
        script(tmp_path / "bin" / name, text)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "FIRST": str(code), "SLURM_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": str(restarts), "SECONDS": str(seconds)}  # of the shell: since the job started
    command = [LAUNCH / "slurm.sbatch", "--in_the_job", "--config=c"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == expected, done
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_slurm_job_saves_and_comes_back_before_its_time_is_over(tmp_path):
    """SIGUSR1 to the batch script becomes SIGTERM to all processes of the tasks, of which training makes 130."""
    task = "trap 'sleep 0.5; touch saved; exit 130' TERM; touch started; while :; do sleep 0.1; done"
    srun = 'until [[ $1 == bash ]]; do shift; done; "$@" & echo $! >task; wait $!'
    fakes = {
        "srun": srun,
        "python": task,
        "scontrol": "echo scontrol $@",
        "scancel": 'echo "$@"; kill -TERM $(<task) $(pgrep -P $(<task))',
    }
    for name, text in fakes.items():
        script(tmp_path / "bin" / name, text)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_JOB_ID": "7"}
    command = [LAUNCH / "slurm.sbatch", "--in_the_job", "--config=c"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    wait((tmp_path / "started").exists)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 130 and (tmp_path / "saved").exists()
    assert "--signal=TERM 7.0" in out and "scontrol requeue 7" in out


# A slice of one host, whose home is $CLOUD/host, if it is there. Installing makes a Python that ends with the next code in
# $CLOUD/codes; "preempted" takes the host away. A word in $CLOUD/troubles is the trouble of one call: "install" fails after
# unpacking, "ssh" does not reach the host, "delete" is refused. With
# $CLOUD/second there is a second host, on which nothing has run.
GCLOUD = """
echo "$4" >>"$CLOUD/calls"
case $4 in
  create) mkdir "$CLOUD/host" ;;
  delete)
    if [[ $(head -n 1 "$CLOUD/troubles") == delete ]]; then sed -i 1d "$CLOUD/troubles"; exit 1; fi
    rm -rf "$CLOUD/host" "$CLOUD/preempted"
    ;;
  list) if [[ -e $CLOUD/preempted ]]; then echo "pod PREEMPTED"; elif [[ -e $CLOUD/host ]]; then echo "pod READY"; fi ;;
  scp) cp "$5" "$CLOUD/host/${6#pod:}" ;;
  ssh)
    [[ -e $CLOUD/preempted ]] && exit 255
    for word; do case $word in --command=*) command=${word#*=} ;; esac; done
    cd "$CLOUD/host"
    trouble=$(head -n 1 "$CLOUD/troubles")
    if [[ $trouble == ssh || ($trouble == install && $command == *uv*) ]]; then sed -i 1d "$CLOUD/troubles"; else trouble=''; fi
    [[ $trouble == ssh ]] && exit 255
    if [[ $command == *uv* ]]; then
      mkdir -p speedit_jax && cp -r "$LAUNCH" speedit_jax
      [[ $trouble ]] && exit 1
      mkdir -p speedit_jax/.venv/bin && cp "$CLOUD/python" speedit_jax/.venv/bin
    else
      bash -c "$command" || exit
      if [[ -e $CLOUD/second && $command == *status* ]]; then echo none; fi
    fi
    ;;
esac
"""
PYTHON = """
code=$(head -n 1 "$CLOUD/codes")
sed -i 1d "$CLOUD/codes"
if [[ $code == preempted ]]; then touch "$CLOUD/preempted"; sleep 100; fi
exit "$code"
"""


def babysit(tmp_path: Path, *codes: str, troubles: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
    """(the babysitter at its end, gcloud's commands that change something) of a run whose starts end with `codes`."""
    script(tmp_path / "bin" / "gcloud", GCLOUD)
    script(tmp_path / "python", PYTHON)
    (tmp_path / "codes").write_text("\n".join(codes) + "\n")
    (tmp_path / "troubles").write_text(troubles.replace(" ", "\n"))
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CLOUD": str(tmp_path), "LAUNCH": str(LAUNCH)}
    flags = ["--tpu=pod", "--zone=z", "--type=t", "--version=v", "--poll=1", "--in_this_process", "--", "--config=c"]
    command = [LAUNCH / "tpu_vm.sh", "babysit", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    calls = (tmp_path / "calls").read_text().split()
    return done, [call for call in calls if call in ("create", "delete")]


def test_babysitter_reruns_and_makes_a_preempted_slice_again(tmp_path):
    done, calls = babysit(tmp_path, "75", "preempted", "137", "130", "0")
    assert done.returncode == 0, done
    assert calls == ["create", "delete", "create"]
    assert (tmp_path / "codes").read_text() == ""
    assert "The slice is PREEMPTED" in done.stdout and "The run ended with 75" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("The run is complete. The slice still costs money: delete it.")


def test_babysitter_gives_up_after_a_mistake(tmp_path):
    done, calls = babysit(tmp_path, "1", "0")
    assert done.returncode == 1 and calls == ["create"] and "ended with a mistake" in done.stdout


def test_babysitter_gives_up_after_five_short_runs(tmp_path):
    done, _ = babysit(tmp_path, *["139"] * 6)
    assert done.returncode == 1 and "the last time with 139" in done.stdout and (tmp_path / "codes").read_text() == "139\n"


@pytest.mark.parametrize("times", [1, 2])
def test_babysitter_installs_again_where_that_failed(tmp_path, times):
    """Twice: at first with the slice that it has made, and then on one where nothing has run yet."""
    done, calls = babysit(tmp_path, "0", troubles=" ".join(["install"] * times) + "\n")
    assert done.returncode == 0 and calls == ["create"], done
    assert done.stdout.count("That failed; the next try is in 1 s.") == times
    assert (tmp_path / "calls").read_text().split().count("scp") == times + 1


def test_babysitter_says_that_a_host_does_not_answer(tmp_path):
    """After the run has started: copying, installing and starting come first."""
    done, _ = babysit(tmp_path, "0", troubles="install ssh ssh\n")
    assert done.returncode == 0, done
    assert done.stdout.count("A host of the slice does not answer; the next try is in 1 s.") == 2


def test_babysitter_waits_after_a_deletion_that_failed(tmp_path):
    done, calls = babysit(tmp_path, "preempted", "0", troubles="delete delete\n")
    assert done.returncode == 0 and calls == ["create", "delete", "delete", "delete", "create"], done
    assert done.stdout.count("That failed; the next try is in 1 s.") == 2


def test_babysitter_takes_a_run_that_one_host_completed_for_complete(tmp_path):
    """The other host may be another one by now, which knows of no run."""
    (tmp_path / "second").touch()
    done, _ = babysit(tmp_path, "0", "1")
    assert done.returncode == 0 and "The run is complete" in done.stdout, done
