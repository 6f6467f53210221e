"""What of a run others may see: its settings without the places of this machine, which tell directories and user names."""

import re
from collections.abc import Mapping
from typing import Any

from speedit_jax import __version__, storage
from speedit_jax.interop import model_hub, own
from speedit_jax.training.run import Run

_NO_PLACES = ("model.name", "name", "class_names")  # DiT-S/2 is no path
_AUTOENCODERS = ("data.vae", "vae")


def settings(run: Run) -> dict[str, Any]:
    """config.json of a repository: all that sampling needs to know of a run, as interop/own.py reads it."""
    facts = {"config": run.config.to_dict(), **{key: run.meta.get(key) for key in own.KEYS if key != "config"}}
    return {own.VERSION: __version__} | shown(facts)


def shown(value: Any, key: str = "") -> Any:
    """JSON with the last part alone of every path in it.

    Args:
      key: under which it is found; with its section, where `value` is not a tree.
    """
    if isinstance(value, Mapping):
        return {name: inner if name in _NO_PLACES else shown(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shown(inner, key) for inner in value]
    return place(value, key in _AUTOENCODERS) if isinstance(value, str) else value


def place(where: str, of_hub: bool = False) -> str:
    """A place by its name: folder:/home/me/cats is folder:cats. Names that are the same on every machine stay as they are.

    Args:
      of_hub: it may be OWNER/NAME on the Hugging Face hub.
    """
    kind, colon, rest = where.partition(":")
    if colon and not rest.startswith("//"):
        return where if kind == "tfds" else f"{kind}:{place(rest, of_hub or kind == 'hf')}"
    if of_hub and model_hub.IN_REPOSITORY.fullmatch(where) and not storage.path(where).exists():
        return where
    return re.split(r"[/\\]", where.rstrip("/\\"))[-1]
