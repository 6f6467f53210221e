"""Floors: lower packages never import upper ones, and each third-party library has one owner."""

import ast
from pathlib import Path

import pytest

import speedit_jax

ROOT = Path(speedit_jax.__file__).parent

# Rooms and modules directly under speedit_jax; rooms not named here may not exist, and modules not named here are commands.
FLOORS = (
    {"testing": 8, "evaluation": 6, "reporting": 5, "sampling": 5, "training": 4, "encoders": 3, "conversion": 6, "models": 2}
    | dict.fromkeys(("diffusion", "kernels", "data", "metrics", "interop"), 1)
    | dict.fromkeys(("storage", "recipes"), 0.2)
    | {"sharding": 0.3, "watchdog": 0.4, "peers": 0.3, "object_store": 0.1, "config": 0.1, "errors": 0}
)
COMMANDS = 7
# Library -> the only places that may import it.
OWNERS = {
    "flax": ("speedit_jax.models",),
    "orbax": ("speedit_jax.training.checkpoint", "speedit_jax.training.s3"),
    "etils": ("speedit_jax.object_store",),
    "fsspec": ("speedit_jax.object_store",),
    "grain": ("speedit_jax.data",),
    "tensorflow_datasets": ("speedit_jax.data",),
    "safetensors": ("speedit_jax.interop", "speedit_jax.testing"),
    "huggingface_hub": ("speedit_jax.interop.model_hub",),
    "transformers": ("speedit_jax.encoders.hub_text",),
    "torch": ("speedit_jax.interop", "speedit_jax.testing"),
    "tensorflow": (),
    "wandb": ("speedit_jax.reporting.wandb_board",),
}


def imports(module, source):
    """Absolute names of all that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name, package):
    return f"{name}.".startswith(f"{package}.")


def floor(module):
    package = module.split(".")[1]
    return FLOORS.get(package, COMMANDS)


def violations(module, source):
    found = []
    for name in imports(module, source):
        library = name.split(".")[0]
        if library in OWNERS and not any(within(module, owner) for owner in OWNERS[library]):
            found.append(f"{module} imports {name}")
        of_the_package = within(name, "speedit_jax") and name != "speedit_jax.__version__"
        if not of_the_package or name.split(".")[1] == module.split(".")[1]:
            continue
        if floor(name) > floor(module) or (floor(name) == floor(module) < COMMANDS):
            found.append(f"{module} imports {name}")
    return found


def imported_commands(module, source):
    """A command defines its flags when it is imported, and two commands in one process would define the same ones."""
    return [name for name in imports(module, source) for command in IMPORTABLE_BY_NONE if within(name, command)]


IMPORTABLE = ("__init__", "cli", "door", *FLOORS)
IMPORTABLE_BY_NONE = [f"speedit_jax.{path.stem}" for path in ROOT.glob("*.py") if path.stem not in IMPORTABLE]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors(path):
    module = ".".join(("speedit_jax", *path.relative_to(ROOT).with_suffix("").parts))
    assert violations(module, path.read_text()) == []


@pytest.mark.parametrize("folder", ["speedit_jax", "configs", "benchmarks", "tests"])
def test_nobody_imports_a_command(folder):
    files = list((ROOT.parent / folder).rglob("*.py"))
    assert files
    assert [path for path in files if imported_commands(folder, path.read_text())] == []
    assert imported_commands("tests", "def f():\n    from speedit_jax.sample import columns_for")
    assert imported_commands("tests", "from speedit_jax import train, cli") == ["speedit_jax.train"]


def test_benchmarks_import_nothing_of_tests():
    """Another package's top-level `tests`, which torch-fidelity for one installs, would be imported instead."""
    files = list((ROOT.parent / "benchmarks").glob("*.py"))
    assert files
    modules = {path.stem for path in (ROOT.parent / "tests").rglob("*.py")} | {"tests"}
    found = {name for path in files for name in imports("benchmarks", path.read_text()) if name.split(".")[0] in modules}
    assert found == set()


def test_every_package_has_a_floor():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= FLOORS.keys()
    assert len(FILES) > 20


@pytest.mark.parametrize(
    "module, source",
    [
        ("speedit_jax.diffusion.gaussian", "from speedit_jax.models import build"),
        ("speedit_jax.diffusion.gaussian", "import speedit_jax.data.loader"),
        ("speedit_jax.data.loader", "from ..diffusion import gaussian"),
        ("speedit_jax.models.build", "def f():\n    from speedit_jax.training.state import TrainState"),
        ("speedit_jax.training.step", "from speedit_jax import cli"),
        ("speedit_jax.training.step", "import flax.linen as nn"),
        ("speedit_jax.training.state", "import orbax.checkpoint as ocp"),
        ("speedit_jax.train", "from grain import python"),
        ("speedit_jax.encode", "from etils import epath"),
        ("speedit_jax.models.build", "import tensorflow_datasets as tfds"),
        ("speedit_jax.data.sources", "import torch.utils.data"),
        ("speedit_jax.interop.dit", "from speedit_jax.models import layers"),
        ("speedit_jax.data.sources", "from tensorflow import io"),
        ("speedit_jax.interop.vae", "from speedit_jax.models import vae"),
        ("speedit_jax.models.vae", "from safetensors.numpy import load_file"),
        ("speedit_jax.encode", "def f():\n    import huggingface_hub"),
        ("speedit_jax.train", "from speedit_jax.testing.vae_weights import write_vae"),
    ],
)
def test_what_is_forbidden_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("speedit_jax.train", "from speedit_jax import cli\nfrom speedit_jax.training import run"),
        ("speedit_jax.training.checkpoint", "import orbax.checkpoint\nfrom speedit_jax import __version__"),
        ("speedit_jax.models.dit", "import flax\nfrom . import layers\nfrom speedit_jax.diffusion import gaussian"),
        ("speedit_jax.interop.files", "def f():\n    import torch"),
        ("speedit_jax.models.vae", "from speedit_jax.interop import vae"),
        ("speedit_jax.interop.model_hub", "def f():\n    from huggingface_hub import hf_hub_download"),
        ("speedit_jax.data.loader", "import grain, tensorflow_datasets\nfrom speedit_jax.errors import UserError"),
        ("speedit_jax.testing.published", "import torch\nfrom speedit_jax.models.vae import build_vae"),
    ],
)
def test_what_is_allowed_is_not(module, source):
    assert violations(module, source) == []
