"""KID (arXiv 1801.01401): the squared maximum mean discrepancy of features under a cubic kernel, without bias."""

import numpy as np


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID between features a [n, D] and b [m, D].

    Args:
      subsets: how many random subsets of each set are compared.
      subset_size: of features drawn without replacement; 2 to min(n, m).
      seed: of the draws.

    Returns:
      (mean, standard deviation) over the subsets. Without bias means below zero now and then, where a and b are alike.
    """
    rng = np.random.default_rng(seed)
    distances = [mmd2(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 of x [m, D] and y [m, D], m >= 2, for the kernel k(x, y) = (x.y / D + 1)^3."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    m = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # many times faster than a power
