"""Samplers and guidance: one lax.scan over the steps of a respaced schedule.

Every sampler is a table of coefficients, a row a step, of one recurrence. From level t to the less noisy t' = t-1, with
alpha = sqrt(abar), sigma = sqrt(1 - abar) and half the log-SNR lambda = log(alpha / sigma), primed at t':

  (1)  x' = a x + b (x0_hat + r (x0_hat - previous x0_hat)) + s z
       a  = sqrt(sigma'^2 - s^2) / sigma,   b = alpha' - alpha a                                 DDIM eq. (12), in x0_hat
       s  = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)                                    DDIM eq. (16)
  (2)  DDIM: r = 0
  (3)  DPM-Solver++(2M): r = h / (2 h_previous), h = lambda' - lambda                            arXiv 2211.01095, algorithm 2
       eta = 0 is the ODE solver, eta = 1 its SDE variant: a = (sigma' / sigma) e^-h, b = alpha' (1 - e^-2h)
  (4)  DDPM: r = 0, a x + b x0_hat the posterior's mean and s^2 the network's variance           DDPM algorithm 2

r is 0 at the first step, which has no previous x0_hat, and at the last, where h is infinite: that one goes to the clean image,
x' = x0_hat, without noise.

  (5)  guidance:  eps_hat = eps_other + w (eps - eps_other)
       the other prediction is that without a label (arXiv 2207.12598) or a weaker network's (arXiv 2406.02507)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.inverse import NOTHING, Known, Plan
from speedit_jax.diffusion.schedules import Schedule, respace, sampling_steps
from speedit_jax.errors import UserError

# (x [B, H, W, C], t [B] as the network knows it) -> [B, H, W, C or 2C]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
# The same, and the condition y: labels int [B], or any tree of arrays [B, ...]
Architecture = Callable[[jax.Array, jax.Array, Any], jax.Array]

SAMPLERS = ("ddpm", "ddim", "dpm++")
SPACINGS = ("even", "logsnr")

# Noisier than this, lambda of a step says nothing of its use: there is no signal to speak of. The linear schedule ends at -5.06.
_NOISIEST = -5.1

# u in (0, 1), the step of training as a fraction, 1 being noise -> its share of the guidance; the mean over u is 1.
GUIDANCE_SCHEDULES = {
    "constant": np.ones_like,
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + np.cos(np.pi * u),
}


def guidance_scales(num_steps: int, scale: float, schedule: str, low: float, high: float) -> np.ndarray:
    """w of eq. (5) for each step t of training: 1 + share(u) (scale - 1) where low <= u <= high, else 1; u = (t + 1/2) / T.

    Args:
      num_steps: T, of training.
      scale: 1 is no guidance, 0 the other prediction.
      schedule: "constant", or "linear" or "cosine", which grow from 1 at pure noise to 2 scale - 1 (arXiv 2404.13040).
      low, high: the interval of guidance (arXiv 2404.07724), from 0, clean, to 1, pure noise.

    Returns:
      [T] float64.

    Raises:
      UserError: unknown schedule, or the interval is empty or not within 0..1.
    """
    if schedule not in GUIDANCE_SCHEDULES:
        raise UserError(f"unknown guidance_schedule {schedule!r}; choose one of {', '.join(GUIDANCE_SCHEDULES)}")
    if not 0 <= low < high <= 1:
        raise UserError(f"guidance_low={low}, guidance_high={high}: must be 0 <= low < high <= 1; 0 is clean, 1 pure noise")
    u = (np.arange(num_steps) + 0.5) / num_steps
    return np.where((low <= u) & (u <= high), 1 + GUIDANCE_SCHEDULES[schedule](u) * (scale - 1), 1.0)


def guided(
    model: Architecture,
    y: Any,
    null: Any,
    scale: float | np.ndarray,
    channels: int,
    guide: Architecture | None = None,
    schedule_index: Callable[[jax.Array], jax.Array] = lambda t: t,
) -> Denoiser:
    """Guidance, eq. (5): away from the null condition in one pass over a doubled batch, or away from `guide` in a pass of each.

    Steps whose scale is 1 run the plain model. Where only some do, both programs are compiled and a lax.cond picks one.

    Args:
      model: (x, t, y) -> output whose first C channels are the prediction.
      y: the condition of each image.
      null: the null condition, a tree like `y` without its leading axes; not needed with a `guide`.
      scale: w, or [T] of them by the step of training; 1 is no guidance, 0 the other prediction.
      channels: how many leading channels are guided: C for all of the prediction, 3 for the published DiT's samples. The
        others, the variance among them, stay the model's own.
      guide: a weaker network of the same prediction, given the same conditions.
      schedule_index: of what the network is told, the step of training that `scale` is looked up at.
    """

    def plain(x, t):
        return model(x, t, y)

    def both(x, t):
        if guide is not None:
            out, other = model(x, t, y), guide(x, t, y)
        else:
            doubled = jax.tree.map(lambda rows, n: jnp.concatenate([rows, jnp.full_like(rows, n)]), y, null)
            out, other = jnp.split(model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), doubled), 2)
        own, other = out[..., :channels], other[..., :channels]
        w = jnp.asarray(scale, out.dtype)
        w = w[schedule_index(t)].reshape(-1, 1, 1, 1) if w.ndim else w
        return jnp.concatenate([other + w * (own - other), out[..., channels:]], axis=-1)

    def either(x, t):
        return jax.lax.cond((jnp.asarray(scale != 1)[schedule_index(t)]).any(), both, plain, x, t)

    if np.all(scale == 1):
        return plain
    return both if np.all(scale != 1) else either


def _half_log_snr(schedule: Schedule) -> np.ndarray:
    """lambda, [T]; finite also where there is no signal at all."""
    # As low as float64 goes: of two steps that are cut to one level the distance, which `_step_table` divides by, would be 0.
    abar = schedule.alphas_cumprod.clip(min=1e-300)
    return np.log(abar / (1 - abar)) / 2


def spaced_steps(schedule: Schedule, spacing: str, num_steps: int | str | Sequence[int]) -> np.ndarray:
    """Rising steps of the schedule.

    Args:
      spacing: "even" in t, as IDDPM's `sampling_steps`, or "logsnr": those nearest to levels even in lambda, each taken once,
        both ends among them.
      num_steps: how many, or for "even" all that `sampling_steps` reads.

    Raises:
      UserError: unknown spacing, or steps that there are not.
    """
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    steps = sampling_steps(schedule.num_steps, num_steps)
    count = len(steps)
    if spacing == "even" or count == 1:
        return steps
    if str(num_steps) != str(count):
        raise UserError(f"spacing=logsnr needs a plain number of sampling steps, not {num_steps!r}")
    levels = _half_log_snr(schedule)
    wanted = np.linspace(levels[0], max(levels[-1], _NOISIEST), count)
    nearest = np.abs(levels[:, None] - wanted).argmin(axis=0)
    nearest[-1] = schedule.num_steps - 1
    # If the wanted levels are closer together than the training steps, take the next training step.
    k = np.arange(count)
    return np.minimum(np.maximum.accumulate(nearest - k) + k, schedule.num_steps - count + k)


def _step_table(schedule: Schedule, sampler: str, eta: float) -> dict[str, np.ndarray]:
    """a, b, r and s of eq. (1), [N] float64 each; DDPM's s, which is the network's, stays out."""
    abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    if sampler == "ddpm":
        a, b, s = schedule.posterior_mean_coef_xt, schedule.posterior_mean_coef_x0, np.zeros_like(abar)
    else:
        s = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        a = np.sqrt((1 - abar_prev - s**2).clip(min=0) / (1 - abar))
        b = np.sqrt(abar_prev) - np.sqrt(abar) * a
    r = np.zeros_like(abar)
    if sampler == "dpm++":
        h = -np.diff(_half_log_snr(schedule))  # h[k] is that of the step from k + 1 to k
        r[1:-1] = h[:-1] / (2 * h[1:])
    return {"a": a, "b": b, "r": r, "s": s}


def _rows(schedule: Schedule, sampler: str, eta: float, plan: Plan) -> dict[str, np.ndarray]:
    """The steps in the order in which they are run: `_step_table`, the columns of `plan`, and what the network is told."""
    rows = plan.rows(np.sqrt(schedule.alphas_cumprod), schedule.sigmas)
    steps = {name: column[rows["level"]] for name, column in _step_table(schedule, sampler, eta).items()}
    # Neither the first step nor one after a time travel has a previous x0_hat to extrapolate from.
    first = rows["number"] == rows["number"][0]
    steps["r"] = np.where(rows["travelled"] | first, 0, steps["r"])
    return rows | steps | {"model_step": schedule.model_steps[rows["level"]]}


def sample(
    denoise: Denoiser,
    x: jax.Array,
    diffusion: GaussianDiffusion,
    noise: Callable[[jax.Array], jax.Array],
    *,
    sampler: str,
    num_steps: int | str | Sequence[int],
    spacing: str = "even",
    eta: float = 0.0,
    clip: bool = False,
    known: Known = NOTHING,
) -> jax.Array:
    """Runs the reverse process from x, pure noise, to images.

    Args:
      denoise: the network, guidance included.
      x: [B, H, W, C] standard normal.
      diffusion: over the schedule of training.
      noise: number k in 0..num_steps-1 (a traced scalar, the first step taken being num_steps-1) -> z like x. With `known`
        further numbers are drawn.
      sampler: "ddpm", "ddim" or "dpm++". A learned variance serves ddpm only.
      num_steps, spacing: which steps of the schedule, as `spaced_steps`.
      eta: noise of ddim and dpm++: 0 is deterministic, 1 close to DDPM, respectively the SDE variant.
      clip: clip x0_hat to [-1, 1]; for pixels, not for latents.
      known: an image that is known in part, or to start from, and how it is used.

    Returns:
      [B, H, W, C].

    Raises:
      UserError: unknown sampler or spacing, or an impossible number of steps.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    schedule = respace(diffusion.schedule, spaced_steps(diffusion.schedule, spacing, num_steps))
    diffusion = dataclasses.replace(diffusion, schedule=schedule)
    rows = _rows(schedule, sampler, eta, known.plan)
    table = {name: column.astype(x.dtype) if column.dtype.kind == "f" else column for name, column in rows.items()}
    x = known.start(x, table)
    batch = x.shape[0]

    def step(carry, row):
        x, previous = carry
        x = known.before(x, row, noise)
        t = jnp.full((batch,), row["level"])
        out = denoise(x, jnp.full((batch,), row["model_step"]))
        _, log_variance, x0 = diffusion.p_mean_log_variance(out, x, t, clip)
        after = row["a"] * x + row["b"] * (x0 + row["r"] * (x0 - previous))
        if sampler == "ddpm" or eta:
            s = jnp.exp(0.5 * log_variance) if sampler == "ddpm" else row["s"]
            after += jnp.where(row["level"] > 0, s, 0) * noise(row["number"])
        return (known.after(after, x0, row), x0), None

    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), jax.tree.map(jnp.asarray, table))
    return known.end(x)
