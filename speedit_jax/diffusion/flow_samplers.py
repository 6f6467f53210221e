"""Samplers of flows, from noise at s = 0 to data at s = 1: one lax.scan over a table of times.

(1)  euler:  x <- x + h v(x, s)
(2)  heun:   x <- x + h (v(x, s) + v(x + h v(x, s), s + h)) / 2                        two evaluations a step
(3)  sde:    x <- x + h (v - eps_hat) + sqrt(2 h sigma_s) z,  the score being -eps_hat / sigma_s: Euler-Maruyama with SiT's
     diffusion coefficient sigma_s; the last step, of 0.04 as in SiT or 1 / N if that is more, without noise
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.inverse import NOTHING, Known
from speedit_jax.errors import UserError

FLOW_SAMPLERS = ("euler", "heun", "sde")
_LAST_STEP = 0.04


def _times(sampler: str, num_steps: int) -> np.ndarray:
    """N + 1 of them."""
    if sampler != "sde":
        return np.linspace(0, 1, num_steps + 1)
    return np.append(np.linspace(0, 1 - max(_LAST_STEP, 1 / num_steps), num_steps), 1.0)


def sample_flow(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    flow: FlowMatching,
    noise: Callable[[jax.Array], jax.Array],
    *,
    sampler: str,
    num_steps: int,
    clip: bool = False,
    known: Known = NOTHING,
) -> jax.Array:
    """Runs the flow from x, pure noise, to images.

    Args:
      denoise: the network, guidance included: (x [B, H, W, C], s [B]) -> [B, H, W, C or 2C].
      x: [B, H, W, C] standard normal.
      noise: index k of the step, num_steps-1 being the first and 0 the last -> z like x. With `known` further ones are drawn.
      sampler: of FLOW_SAMPLERS.
      clip: clip x0_hat to [-1, 1]; for pixels, not for latents.
      known: an image that is known in part, or to start from, and how it is used.

    Returns:
      [B, H, W, C].

    Raises:
      UserError: no positive number of steps.
    """
    if not str(num_steps).isdecimal() or not int(num_steps):
        raise UserError(f"num_steps={num_steps}: a flow needs a positive whole number of sampling steps")
    num_steps = int(num_steps)
    times = _times(sampler, num_steps)
    alpha, sigma, _, _ = PATHS[flow.path](times[:-1], np)
    steps = np.diff(times)
    rows = known.plan.rows(alpha[::-1], sigma[::-1])
    columns = {"s": times[:-1], "h": steps, "spread": np.sqrt(2 * steps * sigma) * (np.arange(num_steps) < num_steps - 1)}
    rows |= {name: column[num_steps - 1 - rows["level"]] for name, column in columns.items()}
    table = {name: column.astype(x.dtype) if column.dtype.kind == "f" else column for name, column in rows.items()}
    x = known.start(x, table)

    def drift(x, s):
        s = jnp.full(x.shape[:1], s)
        v = flow.velocity(denoise(x, s))
        x0, eps = flow.x0_and_eps(v, x, s)
        if clip:
            alpha, sigma, d_alpha, d_sigma = flow.coefficients(s, x)
            x0 = x0.clip(-1, 1)
            # At the end there is no noise left to tell.
            eps = jnp.where(sigma > 0, (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1), eps)
            v = d_alpha * x0 + d_sigma * eps
        return v - eps if sampler == "sde" else v, x0

    def step(x, row):
        x = known.before(x, row, noise)
        slope, x0 = drift(x, row["s"])
        if sampler == "heun":
            ahead = known.after(x + row["h"] * slope, x0, row)
            slope = (slope + drift(ahead, row["s"] + row["h"])[0]) / 2
            x0, _ = flow.x0_and_eps(slope, x, jnp.full(x.shape[:1], row["s"]))
        after = known.after(x + row["h"] * slope, x0, row)
        return (after + row["spread"] * noise(row["number"]) if sampler == "sde" else after), None

    x = jax.lax.scan(step, x, jax.tree.map(jnp.asarray, table))[0]
    return known.end(x)
