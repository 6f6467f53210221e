"""A run as files: config.json, which says what the network is and how it samples, and its tensors.

The tensors have the names of the published codes where those can store the network. Otherwise they are our own arrays, by
their paths in the parameter tree: "blocks.attention.qkv.kernel".
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop.layout import check

VERSION = "speedit_jax"  # the key of config.json that marks it as ours, and the version that wrote it
# The others: the run's config, the shape of what it draws, its classes, the identities of its autoencoder and its text encoder.
KEYS = {"config": dict, "image_shape": list, "class_names": list, "latents": dict | None, "text": dict | None}


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a run."""
    return VERSION in settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises a UserError unless config.json holds what a run needs."""
    for key, kind in KEYS.items():
        if key not in settings or not isinstance(settings[key], kind):
            raise UserError(f"its config.json, of speedit_jax {settings[VERSION]}, has no {key!r} that can be read")


def named(params: Any) -> dict[str, np.ndarray]:
    """A parameter tree -> its arrays by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value) for path, value in leaves}


def from_named(state: Mapping[str, np.ndarray], like: Any) -> Any:
    """The inverse of `named`.

    Args:
      like: the parameter tree, arrays or shapes.

    Raises:
      UserError: a tensor is missing, extra or of another shape.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    check({name: np.shape(value) for name, value in state.items()}, dict(zip(names, (x.shape for _, x in paths), strict=True)))
    return jax.tree.unflatten(tree, [state[name] for name in names])
