"""The densities that timesteps are drawn from beside SpeeDiT's: asymmetric, log-normal and logit-normal."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import integrate, stats

from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_timesteps import make_flow_strategy
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.timesteps import make_strategy

MANY = 10**12  # an even batch so large that half of it is duals to twelve digits

LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("squaredcos_cap_v2", 1000)
QUAD = make_schedule("quad", 1000)
SNR = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)


@pytest.mark.parametrize(
    "k, tau, high, low, below, above_with_dual",
    [
        (2, 700, 1.176471e-3, 5.88235e-4, 0.823529, 0.088235),
        (5, 700, 1.315789e-3, 2.63158e-4, 0.921053, 0.039474),
        (10, 700, 1.369863e-3, 1.36986e-4, 0.958904, 0.020548),
        (25, 700, 1.404494e-3, 5.6180e-5, 0.983146, 0.008427),
        (5, 500, 1.6667e-3, 1.6667e-3 / 5, 0.8333, 0.2025),
        (5, 600, 1.4706e-3, 1.4706e-3 / 5, 0.8824, 0.0904),
        (5, 800, 1.1905e-3, 1.1905e-3 / 5, 0.9524, 0.0238),
        (5, 900, 1.0870e-3, 1.0870e-3 / 5, 0.9783, 0.0109),
    ],
)
def test_asymmetric_sampling(k, tau, high, low, below, above_with_dual):
    strategy = make_strategy(LINEAR, "speed_cvpr25", k=k, tau=tau)
    p = strategy.density
    assert strategy.pivot is None
    np.testing.assert_allclose(p[:tau], k / (1000 + tau * (k - 1)), rtol=1e-12)
    np.testing.assert_allclose(p[tau:], 1 / (1000 + tau * (k - 1)), rtol=1e-12)
    np.testing.assert_allclose([p[0], p[-1]], [high, low], rtol=5e-5)
    np.testing.assert_allclose(p[:tau].sum(), below, atol=5e-5)
    # The published code pairs this density about SpeeDiT's M.
    paired = dataclasses.replace(strategy, pivot=642).marginal(MANY)
    np.testing.assert_allclose(paired[tau:].sum(), above_with_dual, atol=5e-5)


def test_asymmetric_sampling_paired_about_another_boundary():
    m = dataclasses.replace(make_strategy(LINEAR, "speed_cvpr25"), pivot=642).marginal(MANY) * 3800
    steps = {0: 5, 1: 7.5, 57: 7.5, 58: 5.5, 357: 5.5, 358: 5, 642: 5, 643: 2.5, 699: 2.5, 700: 0.5, 999: 0.5}
    np.testing.assert_allclose(m[list(steps)], list(steps.values()), rtol=1e-9)
    cosine = make_strategy(COSINE, "speed_cvpr25")
    np.testing.assert_allclose(cosine.marginal(256)[700:].sum(), 0.0789, atol=5e-5)
    np.testing.assert_allclose(dataclasses.replace(cosine, pivot=959).marginal(MANY)[700:].sum(), 0.2105, atol=5e-5)


def test_boundary_of_asymmetric_sampling_scales_with_the_schedule():
    p = make_strategy(make_schedule("linear", 250), "speed_cvpr25", k=5, tau=700).density
    np.testing.assert_allclose(p[174] / p[175], 5, rtol=1e-12)
    assert len(np.unique(p)) == 2


def test_lognormal_is_the_nearest_step_of_a_normal_log_sigma():
    strategy = make_strategy(LINEAR, "lognormal")
    log_sigma = 0.5 * np.log(1 / LINEAR.alphas_cumprod - 1)
    drawn = np.random.default_rng(0).normal(-1.2, 1.2, 1_000_000)
    assert strategy.density.sum() == pytest.approx(1, abs=1e-12) and (strategy.density > 0).all()
    # The cumulative density against the normal's, at the borders between steps: a Kolmogorov-Smirnov distance of a million draws.
    borders = (log_sigma[1:] + log_sigma[:-1]) / 2
    empirical = np.searchsorted(np.sort(drawn), borders) / len(drawn)
    np.testing.assert_allclose(np.cumsum(strategy.density)[:-1], empirical, atol=2e-3)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.6, 1.2), (0.5, 0.6)])
def test_logit_normal_is_the_nearest_step_of_a_flows_time(mean, std):
    """The density of u, integrated between the times of the flow that lie half-way between two steps in log-SNR."""
    density = make_strategy(LINEAR, "logit_normal", logit_mean=mean, logit_std=std).density
    log_snr = np.log(SNR)
    between = np.exp(-(log_snr[1:] + log_snr[:-1]) / 4)  # noise levels
    edges = np.concatenate([[0], between / (1 + between), [1]])

    def of_u(u):
        return np.exp(-((np.log(u / (1 - u)) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * u * (1 - u))

    for t in (1, 20, 300, 640, 998):
        mass, _ = integrate.quad(of_u, edges[t], edges[t + 1], epsabs=0, epsrel=1e-10)
        np.testing.assert_allclose(density[t], mass, rtol=1e-9)
    assert density.sum() == pytest.approx(1, abs=1e-12)


def test_logit_normal_against_drawn_times():
    density = make_strategy(LINEAR, "logit_normal").density
    n = 400_000
    u = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal(n)))
    log_snr = 2 * np.log((1 - u) / u)
    nearest = np.abs(np.log(SNR)[:, None] - log_snr[None, :2000]).argmin(axis=0)
    middles = -(np.log(SNR)[1:] + np.log(SNR)[:-1]) / 2
    drawn = np.searchsorted(middles, -log_snr)
    np.testing.assert_array_equal(drawn[:2000], nearest)
    blocks = np.bincount(drawn // 20, minlength=50) / n
    expected = density.reshape(50, 20).sum(axis=1)
    often = n * expected > 30  # about normal
    assert expected[often].sum() > 0.999
    # Five standard errors of each block's frequency.
    assert (np.abs(blocks - expected) < 5 * np.sqrt(expected / n))[often].all()


@pytest.mark.parametrize("mean, scale", [(0.0, 0.5), (1.5, 2.0), (-3.0, 1.0)])
def test_laplace_is_the_nearest_step_of_a_laplace_log_snr(mean, scale):
    strategy = make_strategy(LINEAR, "laplace", laplace_mean=mean, laplace_scale=scale)
    density, log_snr = strategy.density, np.log(SNR)
    edges = np.concatenate([[np.inf], (log_snr[1:] + log_snr[:-1]) / 2, [-np.inf]])
    # scipy's law between the borders; from the side on which the difference of two numbers keeps its digits.
    law = stats.laplace(mean, scale)
    expected = np.where(log_snr > mean, law.sf(edges[1:]) - law.sf(edges[:-1]), law.cdf(edges[:-1]) - law.cdf(edges[1:]))
    np.testing.assert_allclose(density, expected, rtol=1e-9)
    assert density.sum() == pytest.approx(1, abs=1e-12) and (density > 0).all()
    # The paper's schedule draws from the same law: log-SNR of an even u is mu - b sgn(1/2 - u) log(1 - 2 |u - 1/2|).
    u = (np.arange(100_000) + 0.5) / 100_000
    drawn = mean - scale * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(u - 0.5))
    np.testing.assert_allclose(np.cumsum(density)[:-1], 1 - np.searchsorted(np.sort(drawn), edges[1:-1]) / len(u), atol=2e-5)


def test_laplace_draws_about_equal_signal_and_noise():
    strategy = make_strategy(LINEAR, "laplace")
    assert np.log(SNR)[np.argmax(strategy.density / -np.gradient(np.log(SNR)))] == pytest.approx(0, abs=0.01)
    # Within a factor of e in SNR lie 1 - e^-2 of the draws.
    assert strategy.density[np.abs(np.log(SNR)) < 1].sum() == pytest.approx(1 - math.exp(-2), abs=5e-3)
    flow = make_flow_strategy(FlowMatching("linear"), LINEAR, 256, strategy="laplace")
    of_flow = FlowMatching("linear").schedule.alphas_cumprod
    level = np.log(of_flow / (1 - of_flow))
    assert flow.density[np.abs(level) < 1].sum() == pytest.approx(1 - math.exp(-2), abs=5e-3)


@pytest.mark.parametrize("strategy", ["lognormal", "logit_normal"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, QUAD], ids=lambda s: s.name)
def test_no_tail_is_lost_to_rounding(schedule, strategy):
    density = make_strategy(schedule, strategy).density
    assert (density > 0).all()
    assert density.sum() == pytest.approx(1, abs=1e-12)
    mean, std = (-1.2, 1.2) if strategy == "lognormal" else (0, 1)
    log_sigma = -0.5 * np.log(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))
    np.testing.assert_allclose(density[-1], stats.norm.sf((log_sigma[-2:].mean() - mean) / std), rtol=1e-9)
    np.testing.assert_allclose(density[0], stats.norm.cdf((log_sigma[:2].mean() - mean) / std), rtol=1e-9)
