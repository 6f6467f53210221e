"""Reads files of tensors by what they are, whatever they are called: .safetensors, .npz, and torch.save's."""

import json
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from speedit_jax.errors import UserError
from speedit_jax.interop import pickles
from speedit_jax.storage import first_line

KINDS = ".safetensors, .npz, or what torch.save writes (.pt, .pth, .bin, .ckpt)"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: Path) -> dict[Any, Any]:
    """What a file holds, as nested as it was saved: arrays or PyTorch's tensors by name, and `pickles.Inert`s.

    Raises:
      UserError: no file of weights, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as e:
        raise UserError(f"it cannot be read: {e.strerror}") from e
    if not head.strip(b"\0 \r\n"):
        raise UserError("it is empty; download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError("it is a pointer of Git LFS, not the file itself; run git lfs pull where it was cloned")
    if head.lstrip().startswith(b"<"):
        raise UserError("it is a web page, not weights; open the address in a browser to see why, and download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if head.startswith(b"\x80"):  # a pickle, as torch.save wrote before PyTorch 1.6
        return _tensors_by_name(pickles.read(path))
    raise UserError(f"it is no file of weights that is known here: {KINDS}")


def arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays or PyTorch's tensors -> float32 arrays.

    Raises:
      UserError: something is no tensor, or holds numbers that are not finite.
    """
    found = {}
    for name, value in tensors.items():
        if not is_tensor(value):
            raise UserError(f"{name!r} is not a tensor but a {getattr(value, 'kind', '') or type(value).__name__}")
        if not isinstance(value, np.ndarray):
            value = value.detach().float().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            found[name] = np.asarray(value, np.float32)
    check_finite(found)
    return found


def check_finite(state: Mapping[str, np.ndarray]) -> None:
    """Raises a UserError that names the first tensor with NaN or infinity in it."""
    for name, value in state.items():
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            raise UserError(
                f"{name} is not finite: {bad:,} of its {value.size:,} numbers are NaN or infinite (a training that diverged, or"
                " half precision that overflowed)"
            )


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there are no tensors of it
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Views of the mapped file, of dtypes too that safetensors does not give to NumPy."""
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks that header and length fit
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        content = np.memmap(path, np.uint8, "r", offset=8 + length) if path.stat().st_size > 8 + length else np.empty(0, np.uint8)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"it is no whole .safetensors file ({first_line(e)}); download or copy it again") from e
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        if tensor["dtype"] not in _DTYPES:
            raise UserError(f"{name} has dtype {tensor['dtype']}; known are {', '.join(_DTYPES)}")
        start, end = tensor["data_offsets"]
        found[name] = content[start:end].view(_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found


def _read_zip(path: Path) -> dict[Any, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as e:
        raise UserError("it is cut short or damaged; download or copy it again") from e
    if any(name.endswith("constants.pkl") for name in names):
        raise UserError("it is a TorchScript program; save the state_dict of its module")
    if any(name.endswith("data.pkl") for name in names):
        return _tensors_by_name(pickles.read(path))
    if not names or not all(name.endswith(".npy") for name in names):
        raise UserError(f"it is a zip archive of {', '.join(names[:3]) or 'nothing'}; unpack it and give the weights in it")
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"it cannot be read as an .npz file ({first_line(e)})") from e


def _tensors_by_name(content: Any) -> dict[Any, Any]:
    if isinstance(content, pickles.Inert) and not content:
        raise UserError(f"it holds a whole {content.kind}, not tensors by name; save its state_dict()")
    if not isinstance(content, Mapping):
        raise UserError(f"it holds a {type(content).__name__}, not tensors by name")
    return dict(content)
