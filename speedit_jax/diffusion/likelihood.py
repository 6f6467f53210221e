r"""The variational bound on how many bits the model needs for an image: L_T + sum over t = 0..T-1 of vb_t, DDPM eq. (5).

  (1)  L_T = KL(q(x_T | x_0) || N(0, 1)) / log 2,  the prior's share, which no network changes
  (2)  vb_t of gaussian.py, eq. (5): t > 0 is a KL, t = 0 the decoder's negative log likelihood of 8-bit pixels

All in bits per dimension, of images whose numbers are those of 8 bits on [-1, 1]. Each vb_t takes one draw of x_t: the sum is an
unbiased estimate of the bound, and the bound is above the model's true -log2 p(x_0).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.gaussian import GaussianDiffusion, mean_flat, normal_kl


def prior_bits(x0: jax.Array, diffusion: GaussianDiffusion) -> jax.Array:
    """L_T of eq. (1). [B]"""
    abar = diffusion.schedule.alphas_cumprod[-1]
    return mean_flat(normal_kl(np.sqrt(abar) * x0, np.log(1 - abar), 0.0, 0.0)) / np.log(2.0)


def bound_terms(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    steps: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    diffusion: GaussianDiffusion,
    clip: bool,
) -> dict[str, jax.Array]:
    """Terms of the bound at `steps` of the schedule, one after the other.

    Args:
      network: (x_t [B, H, W, C], model time [B]) -> output [B, H, W, C or 2C].
      x0: [B, H, W, C].
      steps: [k] int.
      noise: step -> normal noise like x0.
      clip: clip the predicted image to [-1, 1].

    Returns:
      "vb" of eq. (2), and the mean squared errors "mse" of epsilon and "x0_mse" of the image. Each [B, k].
    """

    def one(_, step):
        t, eps = jnp.full(len(x0), step), noise(step)
        x_t = diffusion.q_sample(x0, t, eps)
        output = network(x_t, diffusion.model_time(t))
        x0_hat, eps_hat = diffusion.predict_x0_and_eps(output, x_t, t, clip)
        return None, {
            "vb": diffusion.variational_bound(output, x0, x_t, t, clip),
            "mse": mean_flat((eps_hat - eps) ** 2),
            "x0_mse": mean_flat((x0_hat - x0) ** 2),
        }

    _, terms = jax.lax.scan(one, None, steps)
    return jax.tree.map(jnp.transpose, terms)
