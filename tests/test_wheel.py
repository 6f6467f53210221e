"""The wheel: what is installed, and that it trains far from this checkout, beside a project with a `configs` of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ONE_DEVICE, ROOT, TINY

RECIPE = """
from configs import WIDTH
from speedit_jax.config import get_config as defaults


def get_config():
    c = defaults("DiT-tiny/2")
    c.data.source = "digits"
    c.data.height = c.data.width = 8
    c.data.channels = 1
    c.model.width, c.model.depth, c.model.heads = WIDTH, 1, 2
    c.training.num_steps = 4
    c.training.batch_size = 16
    c.training.log_every = 2
    c.training.sample_every = 4
    c.sampling.num_steps = 2
    c.checkpoint.every = 4
    return c
"""


# In which this checkout is not to be found.
ENV = {name: value for name, value in ONE_DEVICE.items() if name != "PYTHONPATH"}


def call(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Of a copy, so that setuptools finds nothing of an earlier build and leaves nothing here."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    for name in ("benchmarks", "configs", "speedit_jax", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={root}", root, cwd=root)
    (path,) = root.glob("*.whl")
    return path


@pytest.mark.slow
def test_all_of_the_package_and_nothing_else_is_installed(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "speedit_jax").rglob("*") if path.suffix in (".py", ".html")}
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert installed == files


@pytest.mark.slow
def test_a_recipe_of_another_project_trains(wheel, tmp_path):
    environment, project = tmp_path / "venv", tmp_path / "project"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    call(sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies of here. The .pth files among them, by which an editable installation is found, are not read.
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    (project / "configs").mkdir(parents=True)
    (project / "configs" / "__init__.py").write_text("WIDTH = 16\n")
    (project / "myrecipe.py").write_text(RECIPE)
    where = call(python, "-c", "import speedit_jax; print(speedit_jax.__file__)", cwd=project)
    assert Path(where).is_relative_to(environment)
    speedit = python.with_name("speedit")
    assert "\n  sample " in call(speedit, "--help", cwd=project)
    train = [speedit, "train", "--config=myrecipe.py", "--workdir=run"]
    call(*train, cwd=project)
    assert (project / "run" / "report.html").exists() and (project / "run" / "checkpoints" / "4").is_dir()
    assert "step 4 of 4" in call(python, "-m", "speedit_jax.train", *train[2:], cwd=project)
    # The recipes are installed, and what a project calls `configs` is its own.
    call(speedit, "train", "--config=digits", "--workdir=digits", *TINY[1:], cwd=project)
    call(speedit, "timesteps", "--config=imagenet:DiG-S/2", "--out=imagenet.png", cwd=project)
    assert (project / "digits" / "checkpoints" / "6").is_dir() and (project / "imagenet.png").exists()
