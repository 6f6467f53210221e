"""The order of the deterministic samplers, on a Gaussian mixture whose perfect network is known, in float64.

With y = x / alpha and s = sigma / alpha the probability flow is dy/ds = (y - x0_hat(y, s)) / s: scipy integrates it from the
same start between the same two noise levels. The steps between them are even in log-SNR, for only then do all of them shrink
as their number grows: steps even in t keep log-SNR ratios near t = 0 that do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import Schedule

NOISIEST, CLEANEST = -3.0, 2.5  # lambda = log(alpha / sigma): alpha is 0.05 and sigma 0.08
MEANS, WEIGHTS, SPREAD = np.array([[-0.8, 0.3], [0.5, 0.6], [0.4, -0.7]]), np.array([0.2, 0.5, 0.3]), 0.3
COUNTS = (160, 320)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def perfect_x0(y, s):
    """E[x_0 | x_0 + s eps = y]; y is [B, 2]."""
    variance = SPREAD**2 + s**2
    away = y[:, None] - MEANS
    share = jax.nn.softmax(jnp.log(WEIGHTS) - (away**2).sum(-1) / (2 * variance))
    return y - s**2 / variance * jnp.einsum("bk,bkd->bd", share, away)


def even_in_log_snr(num_steps):
    """A schedule of just the steps that are to be taken, t = 0 the cleanest."""
    abar = 1 / (1 + np.exp(-2 * np.linspace(CLEANEST, NOISIEST, num_steps)))
    return Schedule("even in log-SNR", 1 - abar / np.append(1, abar[:-1]), np.arange(num_steps))


def sampled(x, sampler, num_steps):
    """The sampler's images from x at the noisiest level."""
    schedule = even_in_log_snr(num_steps)
    alpha, sigma = jnp.sqrt(schedule.alphas_cumprod), jnp.asarray(schedule.sigmas)

    def denoise(x, t):
        a, s = alpha[t[0]], sigma[t[0]]
        return (x - a * perfect_x0(x.reshape(-1, 2) / a, s / a).reshape(x.shape)) / s

    diffusion = GaussianDiffusion(schedule, "fixed_small")
    return sample(denoise, x, diffusion, jnp.zeros_like, sampler=sampler, num_steps=num_steps)


@pytest.fixture(scope="module")
def flow():
    """(x at the noisiest level, images that the exact flow makes of it)."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(16, 2))
        derivative = jax.jit(lambda s, y: ((y.reshape(-1, 2) - perfect_x0(y.reshape(-1, 2), s)) / s).reshape(-1))
        interval = np.exp(-np.array([NOISIEST, CLEANEST]))
        alpha = 1 / np.sqrt(1 + interval[0] ** 2)
        solution = solve_ivp(derivative, interval, x.reshape(-1) / alpha, method="DOP853", rtol=1e-11, atol=1e-11)
        # The samplers' last step goes from the cleanest level to the image that the network sees there.
        return x.reshape(-1, 1, 1, 2), np.asarray(perfect_x0(solution.y[:, -1].reshape(-1, 2), interval[1])).reshape(-1, 1, 1, 2)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order(flow, sampler, order):
    x, exact = flow
    errors = [float(jnp.abs(sampled(jnp.asarray(x), sampler, n) - exact).max()) for n in COUNTS]
    # n levels have n - 1 steps between them.
    steps = np.array(COUNTS) - 1
    measured = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    np.testing.assert_allclose(measured, order, atol=0.05)  # 0.97 and 2.00
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]
