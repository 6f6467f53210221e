"""Improved precision and recall (arXiv 1904.06991): how much of one set lies in the manifold of the other.

A manifold is the union of balls around a set's points, each as wide as the distance to the point's k-th nearest neighbour.
"""

from collections.abc import Iterator

import numpy as np

_BLOCK = 2048  # rows of features at a time: a block of distances is 32 MB, whatever the number of images


def precision_recall(reference: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall), each from 0 to 1.

    Args:
      reference, generated: features [n, D] and [m, D], more than k of each.

    Returns:
      The share of generated features in the reference's manifold, and of the reference's in the generated ones' manifold.
    """
    of_reference, of_generated = squared_radii(reference, k), squared_radii(generated, k)
    generated_inside, reference_inside = np.zeros(len(generated), bool), np.zeros(len(reference), bool)
    for rows, columns, distances in distance_blocks(generated, reference):
        generated_inside[rows] |= (distances <= of_reference[columns]).any(axis=1)
        reference_inside[columns] |= (distances <= of_generated[rows, None]).any(axis=0)
    return float(generated_inside.mean()), float(reference_inside.mean())


def squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each feature [n, D] to its k-th nearest neighbour, itself not counted: float64 [n]."""
    nearest = np.full((len(features), k + 1), np.inf)  # k neighbours and the point itself
    for rows, _, distances in distance_blocks(features, features):
        candidates = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(candidates, k, axis=1)[:, : k + 1]
    return nearest.max(axis=1)


def distance_blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows of x, rows of y, squared distances between them, float64)."""
    for first in range(0, len(x), _BLOCK):
        rows = slice(first, min(first + _BLOCK, len(x)))
        a = np.asarray(x[rows], np.float64)
        for second in range(0, len(y), _BLOCK):
            columns = slice(second, min(second + _BLOCK, len(y)))
            b = np.asarray(y[columns], np.float64)
            squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
            yield rows, columns, np.maximum(squares - 2 * a @ b.T, 0)
