"""The bound against the exact code length of data whose optimal network is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from speedit_jax.diffusion.gaussian import PREDICTIONS, GaussianDiffusion
from speedit_jax.diffusion.likelihood import bound_terms, prior_bits
from speedit_jax.diffusion.schedules import make_schedule

STD = 0.2  # of the data, independent normal pixels
SCHEDULE = make_schedule("linear", 25)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def optimal_network(diffusion):
    """E[x_0 | x_t] and Var[x_{t-1} | x_t], both exact for N(0, STD^2): with them the reverse chain is the true one.

    q(x_{t-1} | x_t) = E over x_0 of N(a x_0 + b x_t, btilde) has the variance btilde + a^2 Var[x_0 | x_t].
    """
    s, abar = SCHEDULE, SCHEDULE.alphas_cumprod
    gain = np.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
    left = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    log_variance = np.log(s.posterior_variance + s.posterior_mean_coef_x0**2 * left)
    low, high = s.posterior_log_variance_clipped, np.log(s.betas)
    r = 2 * (log_variance - low) / (high - low) - 1

    def network(x, t):
        x0 = jnp.asarray(gain)[t][:, None, None, None] * x
        abar_t = jnp.asarray(abar)[t][:, None, None, None]
        eps = (x - jnp.sqrt(abar_t) * x0) / jnp.sqrt(1 - abar_t)
        said = {"epsilon": eps, "x0": x0, "v": jnp.sqrt(abar_t) * eps - jnp.sqrt(1 - abar_t) * x0}[diffusion.prediction]
        return jnp.concatenate([said, jnp.broadcast_to(jnp.asarray(r)[t][:, None, None, None], x.shape)], axis=-1)

    return network


def unit_quantiles(n):
    """n numbers of mean 0 and mean square 1, shaped as the normal law: every term but the decoder's is quadratic in the noise."""
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return z / np.sqrt((z**2).mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_optimal_network_needs_as_many_bits_as_the_data_have(prediction):
    diffusion = GaussianDiffusion(SCHEDULE, prediction=prediction)
    values = np.linspace(-3, 3, 13) * STD  # an image is one value over and over, so that its bound is that value's
    x0 = jnp.asarray(np.broadcast_to(values[:, None, None, None], (13, 32, 32, 1)))
    noise = jnp.asarray(unit_quantiles(32 * 32).reshape(1, 32, 32, 1)) + 0 * x0
    bound = jax.jit(
        lambda x0: (
            prior_bits(x0, diffusion),
            bound_terms(optimal_network(diffusion), x0, jnp.arange(25), lambda t: noise, diffusion, clip=False)["vb"],
        )
    )
    prior, vb = bound(x0)
    exact = -np.log2(np.diff(stats.norm.cdf(values[:, None] + np.array([-1, 1]) / 255, scale=STD)).squeeze())
    # The bin is 1/8 of the decoder's standard deviation, which costs (1/8)^2 / 24 nats; and the CDF is Page's approximation.
    np.testing.assert_allclose(prior + vb.sum(axis=1), exact, atol=0.01)
    assert (vb > -1e-9).all()
    # Of data drawn from the law it is the entropy.
    weight = stats.norm.pdf(values, scale=STD) * (values[1] - values[0])
    entropy = 0.5 * np.log2(2 * np.pi * np.e * STD**2) + np.log2(255 / 2)
    np.testing.assert_allclose(weight @ exact / weight.sum(), entropy, atol=0.03)


def test_a_worse_network_needs_more():
    diffusion = GaussianDiffusion(SCHEDULE)
    network = optimal_network(diffusion)
    x0 = jnp.asarray(STD * unit_quantiles(32 * 32).reshape(1, 32, 32, 1))
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((25, *x0.shape)))

    def total(error):
        def worse(x, t):
            return network(x, t) + error * jnp.array([1.0, 0.0])

        return bound_terms(worse, x0, jnp.arange(25), lambda t: noise[t], diffusion, clip=False)["vb"].sum()

    totals = [total(error) for error in (0.0, 0.1, 0.2)]
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_prior_is_the_kl_to_a_standard_normal(scale):
    diffusion = GaussianDiffusion(make_schedule("linear", 1000))
    x0 = scale * jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)))
    abar = diffusion.schedule.alphas_cumprod[-1]
    nats = 0.5 * (abar * x0**2 + (1 - abar) - 1 - np.log(1 - abar))
    np.testing.assert_allclose(prior_bits(x0, diffusion), nats.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-6)


def test_terms_do_not_depend_on_which_steps_are_asked_for_together():
    diffusion = GaussianDiffusion(SCHEDULE)
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)))
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((25, *x0.shape)))

    def terms(steps):
        return bound_terms(optimal_network(diffusion), x0, jnp.asarray(steps), lambda t: noise[t], diffusion, clip=True)

    whole, parts = terms(range(25)), [terms(range(10)), terms(range(10, 25))]
    for name, values in whole.items():
        assert values.shape == (2, 25)
        np.testing.assert_allclose(values, np.concatenate([part[name] for part in parts], axis=1), rtol=1e-12)
