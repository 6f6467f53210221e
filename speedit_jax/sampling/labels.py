"""The class of each sample."""

import jax
import numpy as np

from speedit_jax.data.classes import number_of
from speedit_jax.errors import UserError

_STREAM = np.uint32(2**32 - 1)  # of an image's random label; the streams of its noise count from 0


def parse_labels(names: list[str] | None, class_names: list[str]) -> np.ndarray:
    """Names or numbers of classes -> their numbers; a folder named "10" is a name first.

    Raises:
      UserError: no such class, several have its name, or the model knows none.
    """
    if names is None:
        return np.arange(max(1, len(class_names)))
    if not class_names:
        raise UserError("--class_labels: this model was trained without classes")
    if not names:
        raise UserError(f"--class_labels is empty; the classes are 0..{len(class_names) - 1}")
    return np.array([number_of(name, class_names, "--class_labels") for name in names])


def random_labels(key: jax.Array, count: int, classes: int) -> np.ndarray:
    """int32 [count] in 0..classes - 1, independent and uniform; label i depends only on (key, i)."""

    def one(index):
        return jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, index), _STREAM), (), 0, classes)

    return np.asarray(jax.vmap(one)(np.arange(count)))
