"""The program `speedit`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, assert_fails

import speedit_jax

PACKAGE = ROOT / "speedit_jax"


def speedit(*arguments: str, root: Path = ROOT, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, "-m", "speedit_jax", *arguments]
    return subprocess.run(command, cwd=root, env={}, capture_output=True, text=True, timeout=60)


def test_help_lists_all_commands_and_imports_none():
    done = speedit("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert listed.keys() == {path.stem for path in PACKAGE.glob("*.py") if "\n    cli.run(" in path.read_text()}
    for name, summary in listed.items():
        assert summary.endswith(".") and len(summary) <= 120
        assert (PACKAGE / f"{name}.py").read_text().startswith(f'"""{summary}\n')
    imported = re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "speedit_jax.errors" in imported
    assert not {"absl", "jax", "numpy", "speedit_jax.cli"} & set(imported)
    assert speedit().stdout == done.stdout


def test_a_new_command_is_found(tmp_path):
    package = tmp_path / "speedit_jax"
    package.mkdir()
    for name in ("__init__", "__main__", "errors"):
        shutil.copy(PACKAGE / f"{name}.py", package)
    command = '"""Says hello.\n\nMore.\n"""\n\nimport sys\n\nif __name__ == "__main__":\n    sys.exit(f"hello {sys.argv[1:]}")\n'
    (package / "hello.py").write_text(command)
    (package / "room.py").write_text('"""Not a command."""\n')
    assert "\n  hello  Says hello.\n" in speedit("--help", root=tmp_path).stdout
    assert "room" not in speedit("--help", root=tmp_path).stdout
    done = speedit("hello", "--to=you", root=tmp_path)
    assert (done.returncode, done.stderr) == (1, "hello ['--to=you']\n")


@pytest.mark.parametrize(
    "argument, words",
    [("trian", "did you mean 'train'? "), ("cli", "unknown command 'cli'; "), ("--workdir=x", "where a command is expected")],
)
def test_a_wrong_command(argument, words):
    done = speedit(argument, "--config=digits")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr and done.stderr.startswith("error: ")


def test_version():
    assert speedit("--version").stdout == f"{speedit_jax.__version__}\n"


def test_a_command_behaves_as_with_python_m(run, tmp_path):
    help_ = run("__main__", "train", "--help")
    assert help_ == run("train", "--help")
    assert "Trains a diffusion transformer." in help_.out and "--workdir" in help_.out
    assert_fails(run("__main__", "report", f"--workdir={tmp_path}"), str(tmp_path))
    assert_fails(run("__main__", "report", "--wrokdir=x"), "wrokdir")
