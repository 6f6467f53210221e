"""What all commands share: flags, config files, --help and Ctrl-C.

Some are run by `python -m` itself; the rest by tests/commands.py.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ONE_DEVICE, ROOT, TINY, assert_fails, run_alone


@pytest.mark.parametrize("override", [[], ["--config.model.width=16"]], ids=["plain", "with an override"])
def test_a_config_file_that_does_not_exist(run, tmp_path, override):
    flags = ["--config=configs/nope.py", f"--workdir={tmp_path / 'run'}", *override]
    assert_fails(run("train", *flags), "configs/nope.py")


def test_a_broken_config_file(run, tmp_path):
    broken = {
        "syntax": ("def get_config(:\n", ["syntax"]),
        "key": ("from speedit_jax import config\n\ndef get_config():\n    return config.get_config().modle\n", ["modle"]),
        "misspelt": (
            "from speedit_jax import config\n\ndef get_config():\n    c = config.get_config()\n    c.optim.lerning_rate = 1e-3\n"
            "    return c\n",
            ['Did you mean "learning_rate"'],
        ),
        "bare": (
            "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'seed': 1, 'init_from': ''})\n",
            ["no checkpoint.every; let its get_config() start from speedit_jax.config.get_config()"],
        ),
        "type": ("def get_config():\n    c = 1 + 'a'\n", ["unsupported operand"]),
        "module": ("import nosuchmodule\n", ["nosuchmodule"]),
        "function": ("x = 1\n", ["get_config"]),
        "dict": ("def get_config():\n    return {}\n", ["get_config", "ConfigDict"]),
    }
    for name, (text, words) in broken.items():
        (tmp_path / f"{name}.py").write_text(text)
        assert_fails(run("train", f"--config={tmp_path / name}.py", f"--workdir={tmp_path / 'run'}"), *words)


@pytest.mark.parametrize("given", [[], ["--config=", "--workdir="]], ids=["left out", "empty"])
def test_missing_flags(run, given):
    workdir, config = ["--workdir=runs/x"], ["--config=configs/digits.py"]
    assert_fails(run("train", *workdir, *given[:1]), "--config is missing")
    assert_fails(run("train", *config, *given[1:]), "--workdir is missing")
    assert_fails(run("sample", *given[1:]), "--workdir is missing")
    assert_fails(run("report", *given[1:]), "--workdir is missing")


def test_flags_before_the_config_file(run):
    assert_fails(run("train", "--config.model.width=3", "--config=configs/digits.py"), "config.model.width")


def test_in_a_process_of_its_own(tmp_path):
    assert_fails(run_alone("train", *TINY, f"--workdir={tmp_path}", "--config.modle.name=x"), "modle", 'Did you mean "model"')
    assert_fails(run_alone("train", *TINY, f"--workdir={tmp_path}", "--nosuch=1"), "nosuch")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flush", [True, False])
def test_output_that_nobody_reads(flush):
    """As after `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from speedit_jax import cli; cli.run(lambda: print('x', flush={flush}))"
    result = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == 1
    assert result.stderr == 'error: nobody reads this command\'s output any more, as after a "| head"; write it to a file\n'


@pytest.mark.parametrize("times", [1, 2], ids=["before the loop", "twice in the loop"])
def test_ctrl_c_leaves_no_traceback(tmp_path, times):
    # What one Ctrl-C in the loop does is test_kill_resume.py's.
    log, workdir = tmp_path / "log", tmp_path / "run"
    waits = [lambda: "devices " in log.read_text()]
    if times == 2:
        waits = [(workdir / "metrics.jsonl").exists, lambda: "SIGINT: saving after this step" in log.read_text()]
    argv = [sys.executable, "-m", "speedit_jax.train", *TINY, f"--workdir={workdir}", "--config.training.num_steps=100000"]
    with log.open("w") as file:
        process = subprocess.Popen(argv, cwd=ROOT, env=ONE_DEVICE, stdout=file, stderr=subprocess.STDOUT)
    try:
        for ready in waits:
            while process.poll() is None and not ready():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        assert process.wait(600) in (-signal.SIGINT, 130)
    finally:
        process.kill()
    assert "Traceback" not in log.read_text() and "Fatal" not in log.read_text(), log.read_text()


@pytest.mark.parametrize("command", ["train", "sample", "report", "verify"])
def test_help(run, command):
    result = run(command, "--help")
    assert result.code in (0, 1)  # absl's own is 1
    assert "--workdir" in result.out and f"python -m speedit_jax.{command}" in result.out
    assert command != "train" or "--config" in result.out
    assert not result.err
