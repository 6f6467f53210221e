"""What torch.save wrote, read so that nothing in it is run.

A pickle names the functions and classes that rebuild its objects. Here the few that rebuild tensors are found; every other
name stands for an `Inert`, which does nothing with what it is given.
"""

import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop.files import need_torch
from speedit_jax.storage import first_line

# What settings are made of in the standard library; its other names are of no use in a file of weights, and a sign of an attack.
_SETTINGS = {
    "_codecs",
    "argparse",
    "array",
    "collections",
    "copyreg",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "logging",
    "pathlib",
    "random",
    "re",
    "types",
    "typing",
    "uuid",
    "zoneinfo",
}
_CODE = {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "file", "input", "open"}  # of builtins
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")


class Inert(dict):
    """Stands for whatever a .pt holds that is no tensor: it does nothing, and shows the items and attributes that were saved.

    Attributes:
      kind: the name of its class.
      saved: its attributes, as a rule a dict; None without.
    """

    kind = ""
    saved: Any = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    # As keys and in sets, where other objects of a class may be too.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __setstate__(self, state):
        self.saved = state

    def append(self, item):
        pass

    def extend(self, items):
        pass


def read(path: Path) -> Any:
    """What torch.save wrote: tensors, plain containers, and `Inert`s for the rest.

    Raises:
      UserError: damaged, or with names that have no place in weights.
    """
    torch = need_torch()
    zipped = zipfile.is_zipfile(path)  # files older than PyTorch 1.6 are not
    module = types.ModuleType("inert_pickle")
    module.Unpickler, module.UnpicklingError = _Unpickler, pickle.UnpicklingError
    module.load = lambda file, **options: _Unpickler(file, **options).load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storages
            return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=module)
    except UserError:
        raise
    except Exception as e:
        # A pickle of garbage raises whatever its bytes happen to mean.
        raise UserError(f"it cannot be read safely as a torch.save file ({first_line(e)})") from e


class _Unpickler(pickle.Unpickler):
    """Python's, restricted as its manual says; torch adds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        torch = need_torch()
        full = f"{module}.{name}"
        if module == "torch" and (name in ("Size", "device") or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "torch.storage.UntypedStorage":  # of newer dtypes; torch finds the other storages itself
            return torch.UntypedStorage
        if module == "torch._utils" and name in _REBUILD:
            rebuild = getattr(torch._utils, name)
            # A function of this file's own, since a pickle may set attributes of what it is given.
            return lambda *args: rebuild(*args)
        root = module.partition(".")[0]
        if root in ("builtins", "__builtin__"):
            harmless = name not in _CODE
        else:
            harmless = root in _SETTINGS or root not in sys.stdlib_module_names
        if not harmless:
            raise UserError(f"it holds {full}, and only tensors are read from a pickle; save them alone")
        return type("Inert", (Inert,), {"kind": full})
