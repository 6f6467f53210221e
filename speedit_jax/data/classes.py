"""The classes of a data set: some of them in an order of one's own, and how many images each has."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from speedit_jax.errors import UserError

_NAMED = 10  # classes that are named one by one


def number_of(name: str, class_names: Sequence[str], asked: str) -> int:
    """The number of the class `name`, a name or a number; a class named "10" is a name first.

    Raises:
      UserError: there is no such class, or several have this name; it begins with `asked`, the setting.
    """
    number = class_names.index(name) if name in class_names else int(name) if name.isdecimal() else -1
    if not 0 <= number < len(class_names):
        shown = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        raise UserError(f"{asked}: no class {name!r}; the classes are 0..{len(class_names) - 1}: {shown}")
    if class_names.count(name) > 1:
        same = ", ".join(str(i) for i, other in enumerate(class_names) if other == name)
        raise UserError(f"{asked}: the classes {same} are all called {name!r}; give the number of the one that is meant")
    return number


def choose(class_names: tuple[str, ...], wanted: str) -> list[int]:
    """The numbers of the classes `wanted`, names or numbers with commas between; of all classes where it is "".

    Raises:
      UserError: there is no such class, several have its name, it is given twice, or there are no classes.
    """
    if not wanted:
        return list(range(len(class_names)))
    if not class_names:
        raise UserError(f"data.classes={wanted}: this data set has no classes")
    chosen = []
    for name in (part.strip() for part in wanted.split(",")):
        number = number_of(name, class_names, f"data.classes={wanted}")
        if number in chosen:
            raise UserError(f"data.classes={wanted}: {name!r} is given twice")
        chosen.append(number)
    return chosen


def relabel(labels: np.ndarray, chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the records of the chosen classes, increasing; their places among the chosen classes, int32)."""
    indices = np.flatnonzero(np.isin(labels, chosen))
    place = {number: i for i, number in enumerate(chosen)}
    return indices, np.array([place[label] for label in labels[indices].tolist()], np.int32)


def describe(source: Any) -> list[str]:
    """Lines for a person: how many images each class of a data source has, as far as is known without reading them all.

    The first line names every class where there are at most ten; of more, the smallest and the largest.
    """
    names, notes = source.class_names, list(getattr(source, "notes", ()))
    if not names:
        return ["no classes", *notes]
    labels = getattr(source, "labels", None)
    if labels is None:
        return [f"{len(names)} classes: {', '.join(_shortened(names))}", *notes]
    counts = np.bincount(labels, minlength=len(names))
    each = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)]
    if len(names) <= _NAMED:
        return [f"{len(names)} class{'es' if len(names) > 1 else ''}: {', '.join(each)}", *notes]
    least, most = (f"{counts[i]:,} ({names[i]})" for i in (counts.argmin(), counts.argmax()))
    spread = f"{least} to {most}, median {np.median(counts):,.0f}" if counts.min() < counts.max() else f"{counts[0]:,} each"
    return [f"{len(names)} classes: {', '.join(_shortened(names))}; images: {spread}", *notes]


def _shortened(names: tuple[str, ...]) -> list[str]:
    return list(names) if len(names) <= _NAMED else [*names[:3], "...", names[-1]]
