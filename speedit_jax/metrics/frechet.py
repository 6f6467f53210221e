"""Means and covariances of features, accumulated in constant memory, and the Fréchet distance between two of them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance needs of a set of features: mean float64 [D] and covariance float64 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over a set of features, in float64; `merge` joins those of two batches, shards or hosts in any order.

    Attributes:
      count: n.
      mean: [D].
      scatter: [D, D], the sum of (x - mean)(x - mean)^T: centred, so that large means do not cancel.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features [n, D], n >= 1."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        between = np.outer(difference * (self.count * other.count / count), difference)
        return Moments(count, self.mean + difference * (other.count / count), self.scatter + other.scatter + between)

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, as np.cov; n >= 2."""
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID (arXiv 1706.08500) where the features are Inception's.

    With C = F F^T, the trace of (C_a C_b)^(1/2) is the sum of the singular values of F_a^T F_b. Nothing is inverted and no
    root is taken of a rounding error, so covariances of any rank are fine, as those of fewer images than features are.
    """
    difference = a.mean - b.mean
    root = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    return max(0.0, float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F [D, rank] with F F^T = covariance; directions whose variance is rounding error are left out."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return vectors[:, kept] * np.sqrt(values[kept])
