"""The class of each sample."""

import jax
import numpy as np

from speedit_jax.errors import UserError

_STREAM = np.uint32(2**32 - 1)  # of an image's random label; the streams of its noise count from 0


def parse_labels(names: list[str] | None, class_names: list[str]) -> np.ndarray:
    """Names or numbers of classes -> their numbers; a folder named "10" is a name first.

    Raises:
      UserError: no such class, or the model knows none.
    """
    if names is None:
        return np.arange(max(1, len(class_names)))
    if not class_names:
        raise UserError("--class_labels: this model was trained without classes")
    if not names:
        raise UserError(f"--class_labels is empty; the classes are 0..{len(class_names) - 1}")
    labels = []
    for name in names:
        number = class_names.index(name) if name in class_names else int(name) if name.isdecimal() else -1
        if not 0 <= number < len(class_names):
            raise UserError(f"--class_labels: no class {name!r}; the classes are 0..{len(class_names) - 1}")
        if class_names.count(name) > 1:
            same = ", ".join(str(i) for i, other in enumerate(class_names) if other == name)
            raise UserError(
                f"--class_labels: the classes {same} are all called {name!r}; give the number of the one that is meant"
            )
        labels.append(number)
    return np.array(labels)


def random_labels(key: jax.Array, count: int, classes: int) -> np.ndarray:
    """int32 [count] in 0..classes - 1, independent and uniform; label i depends only on (key, i)."""

    def one(index):
        return jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, index), _STREAM), (), 0, classes)

    return np.asarray(jax.vmap(one)(np.arange(count)))
