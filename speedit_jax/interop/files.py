"""Files of tensors by name, .pt and .safetensors; torch is imported for .pt only."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from speedit_jax.errors import UserError

# What training code saves beside tensors: its settings, as argparse or OmegaConf keep them.
_SETTINGS = {"argparse.Namespace", "builtins.dict", "builtins.int", "builtins.list", "collections.defaultdict", "typing.Any"}
_SETTINGS_PREFIXES = ("omegaconf.", "pathlib.")


class Inert:
    """Stands for whatever a .pt holds that is no tensor: it does nothing, and shows the attributes that were saved."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.saved = state


def need_torch():
    """The module torch.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(".pt files need PyTorch, which is not installed: pip install torch, or use .safetensors") from e
    return torch


def read_pt(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors, plain containers, and `Inert`s for the rest, none of which is run.

    Raises:
      UserError: damaged, or holding more than tensors and known settings.
    """
    torch = need_torch()
    zipped = zipfile.is_zipfile(path)  # files older than PyTorch 1.6 are not
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        unknown = [name for name in others if name not in _SETTINGS and not name.startswith(_SETTINGS_PREFIXES)]
        if unknown:
            raise UserError(f"it holds {', '.join(unknown)}, and only tensors are read from a pickle; save them alone")
        # A class of its own for each, because torch keeps them by class.
        stand_ins = [(type("Inert", (Inert,), {}), name) for name in others]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as e:
        # A pickle of garbage raises whatever its bytes happen to mean.
        raise UserError(f"it is no file of torch.save that can be read safely ({first_line(e)})") from e
    if not isinstance(content, Mapping):
        raise UserError(f"it holds a {type(content).__name__}, not tensors by name")
    return dict(content)


def arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PyTorch's tensors -> float32 arrays.

    Raises:
      UserError: something is no tensor.
    """
    torch = need_torch()
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name!r} is no tensor, but a {type(value).__name__}")
    return {name: value.detach().float().numpy() for name, value in tensors.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """float32 arrays by name.

    Raises:
      UserError: it cannot be read.
    """
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"it is no .safetensors file that can be read ({first_line(e)})") from e
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def write_pt(path: Path, state: Mapping[str, np.ndarray]) -> None:
    torch = need_torch()
    torch.save({name: torch.from_numpy(np.require(value, requirements="CW")) for name, value in state.items()}, path)


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(value) for name, value in state.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets only its owner read it


def write_new(out: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or directory of another name and renames it, so that what has the name is whole.

    Raises:
      UserError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial.") as scratch:
            write(Path(scratch) / out.name)
            os.replace(Path(scratch) / out.name, out)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise UserError(f"cannot write {out}: {first_line(e)}") from e


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
