"""Writes files of tensors by name, .pt and .safetensors, whole or not at all; torch is imported for .pt only."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from speedit_jax.errors import UserError


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
