r"""Known pixels in a sampler: inpainting and image to image, also with a network that was not trained for it.

y is the known image, m is 1 where it is known. A step goes from a level with x = alpha x_0 + sigma eps to the next one, primed.

  (1)  projection, after each step:    x' <- x' + m alpha' (y - x0_hat)                            DDNM, arXiv 2212.00490
       so the known part of x' is alpha' y with the noise that the step leaves, and the network's eps_hat stays
  (2)  replacement, before each step:  x <- m (alpha y + sigma z) + (1 - m) x                      RePaint, arXiv 2201.09865
  (3)  time travel, from level t back up to t + j:
       x <- u x + w z,  u = alpha_{t+j} / alpha_t,  w^2 = sigma_{t+j}^2 - u^2 sigma_t^2
  (4)  image to image: the sampler starts at a less noisy level, from alpha y + sigma z            SDEdit, arXiv 2108.01073

At the end x is y where m = 1. Levels count from the least noisy one, 0.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.errors import UserError

METHODS = ("projection", "repaint", "network")

# Streams of noise beside that of the steps, which counts their rows from 0.
_TRAVEL, _REPLACE = 2**29, 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a known image enters a sampler.

    Attributes:
      method: one of METHODS: eq. (1), eq. (2), or neither, for a network that is told what is known (masks.py).
      strength: the share of the sampling steps that is run, (0, 1]; 1 starts from pure noise.
      resample: how often each stretch of `jump` steps is run, eq. (3); 1 never goes back.
      jump: steps of a stretch.
    """

    method: str = "projection"
    strength: float = 1.0
    resample: int = 1
    jump: int = 10

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"unknown inpaint={self.method!r}; choose one of {', '.join(METHODS)}")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength}: must lie above 0 and not above 1, which starts from pure noise")
        for name, value in (("resample", self.resample), ("jump", self.jump)):
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")

    def rows(self, alpha: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
        """The steps in the order in which they are run, as columns [R].

        Args:
          alpha, sigma: [N], by level.

        Returns:
          level: where the step starts; number: R - 1, ..., 0, of its noise; travelled: whether eq. (3) comes before it; u, w: of
          eq. (3), 1 and 0 where nothing is undone; alpha, sigma, alpha_next: of the step.

        Raises:
          UserError: there are no `jump` steps to go back.
        """
        count = max(1, round(self.strength * len(alpha)))
        if self.resample > 1 and self.jump >= count:
            raise UserError(f"jump={self.jump}: must be less than the {count} sampling steps that are run")
        level, before = [], []
        times = travel_times(count, self.jump, self.resample)
        lowest = times[0]
        for now, after in itertools.pairwise(times):
            if after < now:
                level.append(now)
                before.append(lowest)
                lowest = after
        level, before = np.array(level), np.array(before)
        travelled = before != level
        u = np.divide(alpha[level], alpha[before], out=np.ones(len(level)), where=travelled)
        return {
            "level": level,
            "number": np.arange(len(level))[::-1],
            "travelled": travelled,
            "u": u,
            "w": np.sqrt((sigma[level] ** 2 - u**2 * sigma[before] ** 2).clip(min=0)),
            "alpha": alpha[level],
            "sigma": sigma[level],
            "alpha_next": np.append(1.0, alpha)[level],
        }


def travel_times(num_steps: int, jump: int, resample: int) -> list[int]:
    """The levels that are visited: from num_steps - 1 down to -1, the clean image.

    At the levels 0, jump, 2 jump, ... below num_steps - jump it goes `jump` levels back up, resample - 1 times each: RePaint's
    schedule, of 4,571 entries for (250, 10, 10).
    """
    left = dict.fromkeys(range(0, num_steps - jump, jump), resample - 1)
    times = [num_steps - 1]
    while times[-1] >= 0:
        times.append(times[-1] - 1)
        if left.get(times[-1]):
            left[times[-1]] -= 1
            times += range(times[-1] + 1, times[-1] + jump + 1)
    return times


@dataclasses.dataclass(frozen=True)
class Known:
    """A known image for each row of a batch.

    Attributes:
      image: y, [B, H, W, C] as the model sees images; None for plain sampling.
      mask: m, bool [B, H, W, 1]; None where nothing is known and the image is only where the sampler starts.
      plan: what is done with them.
    """

    image: jax.Array | None = None
    mask: jax.Array | None = None
    plan: Plan = Plan()

    def start(self, noise: jax.Array, rows: dict[str, np.ndarray]) -> jax.Array:
        """Where the sampler starts, eq. (4)."""
        if self.plan.strength == 1:
            return noise
        alpha, sigma = (rows[name][0].astype(noise.dtype) for name in ("alpha", "sigma"))
        return alpha * self.image + sigma * noise

    def before(self, x: jax.Array, row: dict[str, jax.Array], noise: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """x as the step of `row` takes it, eqs. (3) and (2)."""
        if self.plan.resample > 1:
            x = row["u"] * x + row["w"] * noise(row["number"] + _TRAVEL)
        if self.plan.method == "repaint" and self.mask is not None:
            x = jnp.where(self.mask, row["alpha"] * self.image + row["sigma"] * noise(row["number"] + _REPLACE), x)
        return x

    def after(self, x: jax.Array, x0: jax.Array, row: dict[str, jax.Array]) -> jax.Array:
        """What the step of `row` made, eq. (1); x0 is its x0_hat."""
        if self.plan.method != "projection" or self.mask is None:
            return x
        return jnp.where(self.mask, x + row["alpha_next"] * (self.image - x0), x)

    def end(self, x: jax.Array) -> jax.Array:
        """The image itself where it is known."""
        return x if self.mask is None else jnp.where(self.mask, self.image, x)


NOTHING = Known()


def latent_mask(mask: jax.Array | np.ndarray, latent_shape: Sequence[int]) -> jax.Array:
    """Which latents are known: those of cells with known pixels only, and with such cells all around them.

    An encoder looks beyond the pixels of a cell, so the latents next to a hole know of it.

    Args:
      mask: bool [n, H, W, 1].
      latent_shape: (h, w, ...); h divides H, and w divides W.

    Returns:
      bool [n, h, w, 1].
    """
    n, height, width, _ = mask.shape
    h, w = latent_shape[:2]
    whole = mask.reshape(n, h, height // h, w, width // w).all(axis=(2, 4))
    return jax.lax.reduce_window(whole, np.True_, jax.lax.bitwise_and, (1, 3, 3), (1, 1, 1), "SAME")[..., None]
