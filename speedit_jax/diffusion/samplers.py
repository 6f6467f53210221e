"""Ancestral (DDPM) and implicit (DDIM) samplers: one lax.scan over the steps of a respaced schedule.

  (1)  DDPM:  x_{t-1} = mean_t + exp(log var_t / 2) z                                            DDPM algorithm 2
  (2)  DDIM:  x_{t-1} = sqrt(abar') x0_hat + sqrt(1 - abar' - s^2) eps_hat + s z                 DDIM eq. (12)
       s = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar'),  abar' = abar_{t-1}
  (3)  guidance:  eps_hat = eps_uncond + w (eps_cond - eps_uncond)                               arXiv 2207.12598

No noise z is added at the last step.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.schedules import respace, sampling_steps
from speedit_jax.errors import UserError

# (x [B, H, W, C], t [B] as the network knows it) -> [B, H, W, C or 2C]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

SAMPLERS = ("ddpm", "ddim")


def guided(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    labels: jax.Array,
    null_label: int,
    scale: float,
    channels: int,
) -> Denoiser:
    """Classifier-free guidance, eq. (3), as one pass over a doubled batch; a scale of 1 runs the plain model.

    Args:
      model: (x, t, y) -> output whose first C channels are eps.
      labels: [B] int.
      scale: guidance weight w; 1 is no guidance, 0 the unconditional model.
      channels: how many leading channels are guided: C for all of eps, 3 for the published DiT's samples. The others,
        the variance among them, stay the conditional model's.
    """
    if scale == 1:
        return lambda x, t: model(x, t, labels)
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def denoise(x, t):
        out = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_labels)
        cond, uncond = jnp.split(out, 2)
        eps_c, eps_u = cond[..., :channels], uncond[..., :channels]
        return jnp.concatenate([eps_u + scale * (eps_c - eps_u), cond[..., channels:]], axis=-1)

    return denoise


def sample(
    denoise: Denoiser,
    x: jax.Array,
    diffusion: GaussianDiffusion,
    noise: Callable[[jax.Array], jax.Array],
    *,
    sampler: str,
    num_steps: int | str | Sequence[int],
    eta: float = 0.0,
    clip: bool = False,
) -> jax.Array:
    """Runs the reverse process from x, pure noise, to images.

    Args:
      denoise: the network, guidance included.
      x: [B, H, W, C] standard normal.
      diffusion: over the schedule of training.
      noise: step index k in 0..num_steps-1 (a traced scalar, the first step taken being num_steps-1) -> z like x.
      sampler: "ddpm" or "ddim".
      num_steps: how many of its steps to take, evenly spaced, or which, as `sampling_steps` has it.
      eta: DDIM's noise level: 0 is deterministic, 1 close to DDPM.
      clip: clip x0_hat to [-1, 1]; for pixels, not for latents.

    Returns:
      [B, H, W, C].

    Raises:
      UserError: unknown sampler or an impossible number of steps.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    schedule = respace(diffusion.schedule, sampling_steps(diffusion.schedule.num_steps, num_steps))
    num_steps = schedule.num_steps
    diffusion = dataclasses.replace(diffusion, schedule=schedule)
    abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    ddim_sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)
    table = {
        "k": np.arange(num_steps),
        "model_step": schedule.model_steps,
        "abar_prev_sqrt": np.sqrt(abar_prev).astype(x.dtype),
        "sigma": ddim_sigma.astype(x.dtype),
        "direction": np.sqrt(1 - abar_prev - ddim_sigma**2).astype(x.dtype),
    }
    batch = x.shape[0]

    def step(x, row):
        t = jnp.full((batch,), row["k"])
        out = denoise(x, jnp.full((batch,), row["model_step"]))
        mean, log_variance, x0 = diffusion.p_mean_log_variance(out, x, t, clip)
        if sampler == "ddpm":
            spread = jnp.exp(0.5 * log_variance)
        else:
            eps = diffusion.predict_eps(x, t, x0)
            mean = row["abar_prev_sqrt"] * x0 + row["direction"] * eps
            spread = row["sigma"]
        if sampler == "ddim" and eta == 0:
            return mean, None
        return mean + jnp.where(row["k"] > 0, spread, 0) * noise(row["k"]), None

    x, _ = jax.lax.scan(step, x, jax.tree.map(jnp.asarray, table), reverse=True)
    return x
