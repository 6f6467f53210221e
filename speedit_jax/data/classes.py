"""Some classes of a data set, in an order of one's own."""

import numpy as np

from speedit_jax.errors import UserError


def choose(class_names: tuple[str, ...], wanted: str) -> list[int]:
    """The numbers of the classes `wanted`, names or numbers with commas between; of all classes where it is "".

    A class named "10" is a name first.

    Raises:
      UserError: there is no such class, it is named twice, or there are no classes.
    """
    if not wanted:
        return list(range(len(class_names)))
    if not class_names:
        raise UserError(f"data.classes={wanted}: these data have no classes")
    chosen = []
    for name in (part.strip() for part in wanted.split(",")):
        number = class_names.index(name) if name in class_names else int(name) if name.isdecimal() else -1
        if not 0 <= number < len(class_names):
            shown = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
            raise UserError(f"data.classes={wanted}: no class {name!r}; there are 0..{len(class_names) - 1}: {shown}")
        if number in chosen:
            raise UserError(f"data.classes={wanted}: {name!r} is there twice")
        chosen.append(number)
    return chosen


def relabel(labels: np.ndarray, chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the records of the chosen classes, increasing; their places among the chosen classes, int32)."""
    indices = np.flatnonzero(np.isin(labels, chosen))
    place = {number: i for i, number in enumerate(chosen)}
    return indices, np.array([place[label] for label in labels[indices].tolist()], np.int32)
