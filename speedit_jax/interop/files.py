"""Writes files of tensors by name, .pt and .safetensors; torch is imported for .pt only."""

from collections.abc import Mapping
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
    try:
        safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as e:  # a full disk, as a rule
        raise OSError(str(e)) from e
    path.chmod(0o644)  # safetensors lets only its owner read it
