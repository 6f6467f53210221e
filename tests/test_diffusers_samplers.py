"""Our samplers against diffusers' schedulers, recorded by fixtures/make_diffusers_samplers.py.

Steps, start, noise and network, the perfect one of a Gaussian mixture, are the same on both sides.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pytorch_parity import load

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import make_schedule, respace

T = 1000
LINEAR = make_schedule("linear", T)
ARRAYS = load("diffusers_samplers")
CASES = [name.removesuffix("/images") for name in ARRAYS if name.endswith("/images")]

# Which steps theirs take, n of them, rising.
STEPS = {
    "dpm++/linspace": lambda n: np.linspace(0, T - 1, n + 1).round()[1:],
    "dpm++/leading": lambda n: np.arange(1, n + 1) * (T // (n + 1)),
    "dpm++/trailing": lambda n: np.arange(T, 0, -T / n).round()[::-1] - 1,
    "ddim/leading": lambda n: np.arange(n) * (T // n),
    "ddim/trailing": lambda n: np.arange(T, 0, -T / n).round()[::-1] - 1,
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def mixture_eps(x, t):
    """E[eps | x_t = x] of the recorded mixture."""
    abar = jnp.asarray(LINEAR.alphas_cumprod)[t[0]]
    variance = abar * ARRAYS["spread"] ** 2 + 1 - abar
    away = x.reshape(len(x), 1, -1) - jnp.sqrt(abar) * ARRAYS["means"]
    share = jax.nn.softmax(jnp.log(ARRAYS["weights"]) - (away**2).sum(-1) / (2 * variance))
    return (jnp.sqrt(1 - abar) * jnp.einsum("bk,bkd->bd", share, away) / variance).reshape(x.shape)


@pytest.mark.parametrize("case", CASES)
def test_samples(case):
    sampler, spacing, n, eta, clip = case.split("/")
    steps = STEPS[f"{sampler}/{spacing}"](int(n)).astype(int)
    np.testing.assert_array_equal(steps, ARRAYS[f"{case}/steps"])
    diffusion = GaussianDiffusion(respace(LINEAR, steps), "fixed_small")
    x, noise = jnp.asarray(ARRAYS["x"]), jnp.asarray(ARRAYS["noise"])
    ours = sample(
        mixture_eps, x, diffusion, lambda k: noise[k], sampler=sampler, num_steps=int(n), eta=float(eta), clip=clip == "True"
    )
    # Theirs computes its tables in float32, whose 1e-7 the 1 / sqrt(abar) = 157 of the first step amplifies.
    np.testing.assert_allclose(ours, ARRAYS[f"{case}/images"], rtol=0, atol=1e-4)
