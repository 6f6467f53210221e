r"""Flow matching in SiT's convention (arXiv 2401.08740): time s = 0 is noise and s = 1 is data.

  (1)  x_s = alpha_s x_0 + sigma_s eps
         linear:  alpha = s,              sigma = 1 - s                       (rectified flow, arXiv 2209.03003)
         gvp:     alpha = sin(pi s / 2),  sigma = cos(pi s / 2)
  (2)  v_s = alpha'_s x_0 + sigma'_s eps,    which the network predicts; it is told s itself
  (3)  mse = mean (v - v_hat)^2
  (4)  x0_hat = (sigma' x_s - sigma v_hat) / D,   eps_hat = (alpha v_hat - alpha' x_s) / D,   D = alpha sigma' - sigma alpha'

Strategies draw from tables over levels i = 0..T-1, from data to noise; level i stands for the times 1 - (i + u) / T, 0 < u < 1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.gaussian import mean_flat
from speedit_jax.diffusion.schedules import Schedule

_HALF_PI = math.pi / 2

# path -> s -> (alpha, sigma, alpha', sigma')
PATHS = {
    "linear": lambda s, xp: (s, 1 - s, xp.ones_like(s), -xp.ones_like(s)),
    "gvp": lambda s, xp: (
        xp.sin(_HALF_PI * s),
        xp.cos(_HALF_PI * s),
        _HALF_PI * xp.cos(_HALF_PI * s),
        -_HALF_PI * xp.sin(_HALF_PI * s),
    ),
}

# path -> sigma / alpha -> s
_TIME_OF_RATIO = {"linear": lambda ratio: 1 / (1 + ratio), "gvp": lambda ratio: np.arctan(1 / ratio) / _HALF_PI}


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The path from noise to data, its velocity and the loss; the door is GaussianDiffusion's.

    Attributes:
      path: of PATHS.
      num_steps: T, the levels of the strategies' tables.
      learned_variance: the network has C more output channels, as the published SiT's, which are not used.
    """

    path: str
    num_steps: int = 1000
    learned_variance: bool = False

    @property
    def prediction(self) -> str:
        return f"{self.path} velocity"

    @property
    def weighted(self) -> str:
        """What the strategy's weight multiplies."""
        return f"the mse of {self.prediction}"

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The variance-preserving schedule of the same signal-to-noise ratios, at the middle of each level."""
        alpha, sigma, _, _ = PATHS[self.path](1 - (np.arange(self.num_steps) + 0.5) / self.num_steps, np)
        abar = alpha**2 / (alpha**2 + sigma**2)
        return Schedule(f"{self.path} flow", 1 - abar / np.append(1.0, abar[:-1]), np.arange(self.num_steps))

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """The time at which sigma / alpha is `ratio`."""
        return _TIME_OF_RATIO[self.path](ratio)

    def draw_time(self, key: jax.Array, t: jax.Array) -> jax.Array:
        """Levels [B] int -> times [B] in (0, 1)."""
        return 1 - (t + jax.random.uniform(key, t.shape)) / self.num_steps

    def model_time(self, s: jax.Array) -> jax.Array:
        """What the network is told: s itself, as SiT is."""
        return s

    def schedule_index(self, s: jax.Array) -> jax.Array:
        """The level that time s lies in."""
        return ((1 - s) * self.num_steps).astype(jnp.int32).clip(0, self.num_steps - 1)

    def coefficients(self, s: jax.Array, like: jax.Array) -> tuple[jax.Array, ...]:
        """alpha, sigma and their derivatives at s [B], in the dtype of `like` and shaped to broadcast against it."""
        s = s.astype(like.dtype).reshape(s.shape + (1,) * (like.ndim - s.ndim))
        return PATHS[self.path](s, jnp)

    def q_sample(self, x0: jax.Array, s: jax.Array, noise: jax.Array) -> jax.Array:
        """x_s of eq. (1)."""
        alpha, sigma, _, _ = self.coefficients(s, x0)
        return alpha * x0 + sigma * noise

    def velocity(self, output: jax.Array) -> jax.Array:
        """The network's output [..., C or 2C] -> v_hat."""
        return jnp.split(output, 2, axis=-1)[0] if self.learned_variance else output

    def x0_and_eps(self, v: jax.Array, x_s: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x0_hat, eps_hat) of eq. (4)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(s, x_s)
        d = alpha * d_sigma - sigma * d_alpha
        return (d_sigma * x_s - sigma * v) / d, (alpha * v - d_alpha * x_s) / d

    def losses(self, output: jax.Array, x0: jax.Array, x_s: jax.Array, s: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Per-example training terms, each [B]: "mse", eq. (3)."""
        _, _, d_alpha, d_sigma = self.coefficients(s, x_s)
        return {"mse": mean_flat((d_alpha * x0 + d_sigma * noise - self.velocity(output)) ** 2)}

    def objective(self, terms: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
        """What is minimised of the terms of `losses`. [B]"""
        return weight * terms["mse"]
