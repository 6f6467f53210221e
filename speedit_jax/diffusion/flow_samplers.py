"""Samplers of flows, from noise at s = 0 to data at s = 1: one lax.scan over a table of times.

(1)  euler:  x <- x + h v(x, s)
(2)  heun:   x <- x + h (v(x, s) + v(x + h v(x, s), s + h)) / 2                        two evaluations a step
(3)  sde:    x <- x + h (v - n_hat) + sqrt(2 h sigma_s) z,  the score being -n_hat / (a^2 sigma_s) with noise_scale a:
     Euler-Maruyama with SiT's diffusion coefficient sigma_s, of noise z with standard deviation a; the last step, of 0.04 as in
     SiT or 1 / N if that is more, without noise

Where the network predicts the image, heun's last step is euler's, as JiT's: at s = 1 its velocity is 0 / 0.
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
    x = known.start(flow.scaled(x), table)

    def scaled(number):
        return flow.scaled(noise(number))

    def drift(x, s):
        s = jnp.full(x.shape[:1], s)
        v, n = flow.velocity_and_noise(denoise(x, s), x, s, clip)
        return v - n if sampler == "sde" else v, flow.x0_and_noise(v, x, s)[0]

    def step(x, row):
        x = known.before(x, row, scaled)
        slope, x0 = drift(x, row["s"])
        if sampler == "heun":
            ahead = known.after(x + row["h"] * slope, x0, row)
            first, slope = slope, (slope + drift(ahead, row["s"] + row["h"])[0]) / 2
            slope = jnp.where(row["level"] > 0, slope, first) if flow.predicts_x0 else slope
            x0, _ = flow.x0_and_noise(slope, x, jnp.full(x.shape[:1], row["s"]))
        after = known.after(x + row["h"] * slope, x0, row)
        return (after + row["spread"] * scaled(row["number"]) if sampler == "sde" else after), None

    x = jax.lax.scan(step, x, jax.tree.map(jnp.asarray, table))[0]
    return known.end(x)
