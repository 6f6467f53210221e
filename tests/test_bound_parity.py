"""Losses and the variational bound against the published code in float64, recorded by fixtures/make_bound_fixture.py.

Theirs takes 1 - abar_t / abar_{t-1} for beta_t even where nothing is respaced, a relative 1e-16 / beta_0, and the terms of a KL
are of order one and cancel to 1e-5 at large t: 1e-10 for all but the bound of a predicted image, which is 1e-8 there.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.gaussian import LOSSES, VARIANCES, GaussianDiffusion
from speedit_jax.diffusion.likelihood import bound_terms, prior_bits
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace


@pytest.fixture(scope="module")
def arrays():
    with np.load(pathlib.Path(__file__).parent / "fixtures" / "bound.npz") as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def nhwc(x):
    """PyTorch's layout to ours: [..., C, H, W] -> [..., H, W, C]."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(arrays, loss, variance, prediction):
    x0, noise, error, r = (nhwc(arrays[f"loss/{name}"]) for name in ("x0", "noise", "error", "r"))
    t = jnp.asarray(arrays["loss/t"])
    diffusion = GaussianDiffusion(make_schedule("linear", 250), variance, prediction, loss)
    output = x0 + 0.01 * error if prediction == "x0" else noise + 0.3 * error
    output = jnp.concatenate([output, 0.7 * r], axis=-1) if diffusion.learned_variance else output
    x_t = diffusion.q_sample(x0, t, noise)

    def total(output):
        values = diffusion.objective(diffusion.losses(output, x0, x_t, t, noise), jnp.ones(len(t)))
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(output)
    theirs = f"loss/{loss}/{variance}/{prediction}"
    tolerance = 1e-8 if prediction == "x0" else 1e-10
    np.testing.assert_allclose(values, arrays[f"{theirs}/loss"], rtol=tolerance)
    expected = np.asarray(nhwc(arrays[f"{theirs}/gradient"]))
    # Of each example by itself: their gradients differ by orders of magnitude.
    scale = np.abs(expected).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(gradient / scale, expected / scale, atol=tolerance)


def network(x, t):
    """The fixture's."""
    return jnp.concatenate([jnp.sin(2 * x) + t[:, None, None, None] / 50, jnp.cos(x)], axis=-1)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [25, 7])
def test_bound(arrays, steps, clip):
    x0, noise = nhwc(arrays["bound/x0"]), nhwc(arrays["bound/noise"])
    schedule = make_schedule("linear", 25)
    diffusion = GaussianDiffusion(respace(schedule, even_steps(25, steps)) if steps < 25 else schedule)
    terms = jax.jit(lambda x: bound_terms(network, x, jnp.arange(steps), lambda t: noise[t], diffusion, clip))(x0)
    prior = prior_bits(x0, diffusion)
    theirs = {name: arrays[f"bound/{steps}/{clip}/{name}"] for name in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse")}
    np.testing.assert_allclose(prior, theirs["prior_bpd"], rtol=1e-9)
    np.testing.assert_allclose(terms["vb"], theirs["vb"], rtol=1e-10)
    np.testing.assert_allclose(terms["x0_mse"], theirs["xstart_mse"], rtol=1e-10)
    np.testing.assert_allclose(terms["mse"], theirs["mse"], rtol=1e-10)
    np.testing.assert_allclose(prior + terms["vb"].sum(axis=1), theirs["total_bpd"], rtol=1e-10)
