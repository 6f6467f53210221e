r"""Flow matching in SiT's convention (arXiv 2401.08740): time s = 0 is noise and s = 1 is data.

  (1)  x_s = alpha_s x_0 + sigma_s n,    n = noise_scale eps
         linear:  alpha = s,              sigma = 1 - s                       (rectified flow, arXiv 2209.03003)
         gvp:     alpha = sin(pi s / 2),  sigma = cos(pi s / 2)
  (2)  v_s = alpha'_s x_0 + sigma'_s n,    which the network predicts; it is told s itself
  (3)  mse = mean (v - v_hat)^2
  (4)  x0_hat = (sigma' x_s - sigma v_hat) / D,   n_hat = (alpha v_hat - alpha' x_s) / D,   D = alpha sigma' - sigma alpha'

Or the network predicts the image, and the loss and the samplers are those of the velocity that follows from it (JiT, arXiv
2511.13720, on the linear path). The division by sigma is clamped, for the network and for the target alike:
  (5)  v_hat = (sigma' x_s - D x0_hat) / max(sigma, clamp),    mse = (D / max(sigma, clamp))^2 mean (x_0 - x0_hat)^2

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
      predicts_x0: the network predicts the image instead of the velocity.
      clamp: of eq. (5), positive.
      noise_scale: standard deviation of the noise n. An image with more pixels needs more noise for the same signal-to-noise
        ratio of a patch.
    """

    path: str
    num_steps: int = 1000
    learned_variance: bool = False
    predicts_x0: bool = False
    clamp: float = 0.05
    noise_scale: float = 1.0

    @property
    def prediction(self) -> str:
        return f"{self.path} {'x0' if self.predicts_x0 else 'velocity'}"

    @property
    def weighted(self) -> str:
        """What the strategy's weight multiplies."""
        return f"the mse of {self.path} velocity"

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The variance-preserving schedule of the same signal-to-noise ratios, at the middle of each level."""
        alpha, sigma, _, _ = PATHS[self.path](self._middles, np)
        abar = alpha**2 / (alpha**2 + (self.noise_scale * sigma) ** 2)
        return Schedule(f"{self.path} flow", 1 - abar / np.append(1.0, abar[:-1]), np.arange(self.num_steps))

    @property
    def _middles(self) -> np.ndarray:
        """The time in the middle of each level. [T]"""
        return 1 - (np.arange(self.num_steps) + 0.5) / self.num_steps

    @property
    def worth(self) -> np.ndarray:
        """One over the mse of `losses` where that of the estimate of eps is 1. [T] float64"""
        abar = self.schedule.alphas_cumprod
        ratio = 1.0 / np.sqrt(abar / (1.0 - abar)) / self.noise_scale  # sigma / alpha
        of_linear, of_gvp = 1.0 / (1.0 + ratio) ** 2, 1.0 / (_HALF_PI**2 * (1.0 + ratio**2))
        worth = {"linear": of_linear, "gvp": of_gvp}[self.path] / self.noise_scale**2
        if not self.predicts_x0:
            return worth
        _, sigma, _, _ = PATHS[self.path](self._middles, np)
        return worth * (np.maximum(sigma, self.clamp) / sigma) ** 2

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """The time at which noise over signal, noise_scale sigma / alpha, is `ratio`."""
        return _TIME_OF_RATIO[self.path](ratio / self.noise_scale)

    def draw_time(self, key: jax.Array, t: jax.Array) -> jax.Array:
        """Levels [B] int -> times [B] in (0, 1)."""
        return 1 - (t + jax.random.uniform(key, t.shape)) / self.num_steps

    def less_noise(self, s: jax.Array, by: jax.Array) -> jax.Array:
        """The times s [B], but `by` [B] of the whole path nearer to the data."""
        return jnp.minimum(s + by, 1)

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

    def scaled(self, eps: jax.Array) -> jax.Array:
        """n of eq. (1) from standard normal noise."""
        return eps if self.noise_scale == 1 else self.noise_scale * eps

    def q_sample(self, x0: jax.Array, s: jax.Array, noise: jax.Array) -> jax.Array:
        """x_s of eq. (1), from standard normal noise."""
        alpha, sigma, _, _ = self.coefficients(s, x0)
        return alpha * x0 + sigma * self.scaled(noise)

    def split_output(self, output: jax.Array) -> jax.Array:
        """The network's output [..., C or 2C] -> what it predicts, v_hat or x0_hat [..., C]."""
        return jnp.split(output, 2, axis=-1)[0] if self.learned_variance else output

    def x0_and_noise(self, v: jax.Array, x_s: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x0_hat, n_hat) of eq. (4)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(s, x_s)
        d = alpha * d_sigma - sigma * d_alpha
        return (d_sigma * x_s - sigma * v) / d, (alpha * v - d_alpha * x_s) / d

    def _velocity_of(self, x0: jax.Array, x_s: jax.Array, s: jax.Array) -> jax.Array:
        """v_hat of eq. (5)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(s, x_s)
        d = alpha * d_sigma - sigma * d_alpha
        return (d_sigma * x_s - d * x0) / jnp.maximum(sigma, self.clamp)

    def velocity_and_noise(
        self, output: jax.Array, x_s: jax.Array, s: jax.Array, clip: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """(v_hat, n_hat) of the network's output, whatever it predicts: what the samplers need.

        Args:
          output: [B, ..., C or 2C].
          clip: clip x0_hat to [-1, 1], and let v_hat and n_hat be those that go with the clipped one.
        """
        prediction = self.split_output(output)
        if self.predicts_x0:
            v = self._velocity_of(prediction.clip(-1, 1) if clip else prediction, x_s, s)
            return v, self.x0_and_noise(v, x_s, s)[1]
        x0, noise = self.x0_and_noise(prediction, x_s, s)
        if not clip:
            return prediction, noise
        alpha, sigma, d_alpha, d_sigma = self.coefficients(s, x_s)
        x0 = x0.clip(-1, 1)
        # At the end there is no noise left to tell.
        noise = jnp.where(sigma > 0, (x_s - alpha * x0) / jnp.where(sigma > 0, sigma, 1), noise)
        return d_alpha * x0 + d_sigma * noise, noise

    def target(self, x0: jax.Array, s: jax.Array, noise: jax.Array) -> jax.Array:
        """v of eq. (2), from standard normal noise."""
        _, _, d_alpha, d_sigma = self.coefficients(s, x0)
        return d_alpha * x0 + d_sigma * self.scaled(noise)

    def losses(self, output: jax.Array, x0: jax.Array, x_s: jax.Array, s: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Per-example training terms, each [B]: "mse", eq. (3) or (5)."""
        if self.predicts_x0:
            v, v_hat = (self._velocity_of(image, x_s, s) for image in (x0, self.split_output(output)))
            return {"mse": mean_flat((v - v_hat) ** 2)}
        _, _, d_alpha, d_sigma = self.coefficients(s, x_s)
        return {"mse": mean_flat((d_alpha * x0 + d_sigma * self.scaled(noise) - self.split_output(output)) ** 2)}

    def objective(self, terms: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
        """What is minimised of the terms of `losses`. [B]"""
        return weight * terms["mse"]
