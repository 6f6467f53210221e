"""Flows: the closed forms of their paths, samplers where the perfect network is known, densities carried over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.flow_samplers import FLOW_SAMPLERS, sample_flow
from speedit_jax.diffusion.flow_timesteps import carry_density, make_flow_strategy
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.timesteps import make_strategy

MEAN, SPREAD = 0.3, 0.2


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def batch(seed=0):
    x0, noise = jax.random.normal(jax.random.key(seed), (2, 5, 4, 4, 3))
    return x0, noise, jnp.asarray([0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.mark.parametrize("path", PATHS)
def test_ends_and_derivatives(path):
    x0, noise, s = batch()
    flow = FlowMatching(path)
    x_s = flow.q_sample(x0, s, noise)
    np.testing.assert_allclose(x_s[0], noise[0], atol=1e-15)
    np.testing.assert_allclose(x_s[-1], x0[-1], atol=1e-15)
    _, velocity = jax.jvp(lambda s: flow.q_sample(x0, s, noise), (s,), (jnp.ones_like(s),))
    np.testing.assert_allclose(flow.losses(velocity, x0, x_s, s, noise)["mse"], 0, atol=1e-28)
    np.testing.assert_allclose(flow.losses(velocity + 2, x0, x_s, s, noise)["mse"], 4)


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_tells_image_and_noise(path):
    x0, noise, s = batch()
    flow = FlowMatching(path)
    _, _, d_alpha, d_sigma = flow.coefficients(s, x0)
    told = flow.x0_and_noise(d_alpha * x0 + d_sigma * noise, flow.q_sample(x0, s, noise), s)
    for got, expected in zip(told, (x0, noise), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-13)


def test_channels_that_are_not_used():
    x0, noise, s = batch()
    plain, published = FlowMatching("linear"), FlowMatching("linear", learned_variance=True)
    output = jnp.concatenate([x0, noise], axis=-1)
    x_s = plain.q_sample(x0, s, noise)
    np.testing.assert_array_equal(published.losses(output, x0, x_s, s, noise)["mse"], plain.losses(x0, x0, x_s, s, noise)["mse"])


@pytest.mark.parametrize("path", PATHS)
def test_times_are_uniform_in_their_level(path):
    flow = FlowMatching(path, num_steps=10)
    levels = jnp.repeat(jnp.arange(10), 2000)
    times = np.asarray(flow.draw_time(jax.random.key(0), levels)).reshape(10, 2000)
    below, above = 1 - (np.arange(10) + 1) / 10, 1 - np.arange(10) / 10
    assert ((below <= times.T) & (above >= times.T)).all()
    # Of 2,000 uniform numbers the mean is within four of its standard errors.
    np.testing.assert_allclose(times.mean(axis=1), (below + above) / 2, atol=4 * 0.1 / np.sqrt(12 * 2000))


@pytest.mark.parametrize("path", PATHS)
def test_the_schedule_has_the_paths_ratios(path):
    flow = FlowMatching(path, num_steps=50)
    alpha, sigma, _, _ = PATHS[path](1 - (np.arange(50) + 0.5) / 50, np)
    abar = flow.schedule.alphas_cumprod
    np.testing.assert_allclose(abar / (1 - abar), (alpha / sigma) ** 2)


def test_a_density_is_carried_over_at_equal_ratios():
    vp, flow = make_schedule("linear", 1000), FlowMatching("linear", num_steps=400)
    density = np.where(np.arange(1000) < 700, 5.0, 1.0)
    density /= density.sum()
    carried = carry_density(density, vp, flow)
    np.testing.assert_allclose(carried.sum(), 1, atol=1e-12)
    assert (carried > 0).all()
    # As much lies below a noise-to-signal ratio on either side: the borders of the flow's levels are between two steps of vp.
    levels = np.arange(1, 400)
    steps = np.searchsorted(np.sqrt(1 / vp.alphas_cumprod - 1), levels / (400 - levels))
    before = np.concatenate([[0.0], np.cumsum(density)])
    got = np.cumsum(carried)[:-1]
    assert (got >= before[np.maximum(steps - 1, 0)]).all() and (got <= before[np.minimum(steps + 1, 1000)]).all()


def test_a_uniform_density_becomes_the_jacobian():
    """With many levels the carried density is |d step / d time|, by differences of the map itself."""
    vp, flow = make_schedule("linear", 1000), FlowMatching("gvp", num_steps=100)
    carried = carry_density(np.full(1000, 1e-3), vp, flow)
    # The step, as a real number, of each border between levels.
    log_ratio = 0.5 * np.log(1 / vp.alphas_cumprod - 1)
    borders = np.log(np.tan(np.pi / 2 * np.arange(5, 90) / 100))
    steps = np.interp(borders, log_ratio, np.arange(1000))
    np.testing.assert_allclose(carried[5:89], np.diff(steps) / 1000, rtol=2e-2)


VP = make_schedule("linear", 1000)


def test_strategies_on_flows():
    flow = FlowMatching("linear", num_steps=200)
    uniform = make_flow_strategy(flow, VP, 64, strategy="uniform")
    np.testing.assert_allclose(uniform.density, 1 / 200)
    np.testing.assert_array_equal(uniform.weights, 1)
    # SD3: the flow's own time is logit-normal; its levels are 1 - s.
    z = np.linspace(-8, 8, 400_001)
    time = 1 / (1 + np.exp(-z))
    exact = np.histogram(time, np.linspace(0, 1, 201), weights=np.exp(-0.5 * z**2))[0]
    drawn = make_flow_strategy(flow, VP, 64, strategy="logit_normal").density
    np.testing.assert_allclose(drawn, exact / exact.sum(), atol=2e-4)
    # The velocity's own weight, stated for epsilon, is 1 for the velocity.
    np.testing.assert_allclose(make_flow_strategy(flow, VP, 64, strategy="uniform", weighting="flow").weights, 1)


@pytest.mark.parametrize("strategy", ["speedit", "speed_cvpr25"])
@pytest.mark.parametrize("path", PATHS)
def test_speedit_and_speed_do_the_same_at_the_same_noise(path, strategy):
    """The mass and the mean weight between two noise-to-signal ratios are those of the diffusion."""
    flow = FlowMatching(path)
    there, here = make_strategy(VP, strategy), make_flow_strategy(flow, VP, 64, strategy=strategy)
    ratios = [np.sqrt(1 / s.alphas_cumprod - 1) for s in (VP, flow.schedule)]
    for low, high in ((0.05, 0.5), (0.5, 2), (2, 20)):
        masses = [
            table[(ratio >= low) & (ratio < high)].sum()
            for ratio, table in zip(ratios, (there.marginal(64), here.density), strict=True)
        ]
        # Half a level or step at either end.
        assert masses[1] == pytest.approx(masses[0], rel=0.02)
    if strategy == "speed_cvpr25":
        at = np.interp(1.0, ratios[0], there.weights), np.interp(1.0, ratios[1], here.weights)
        assert at[0] == pytest.approx(at[1], rel=1e-3)
    assert here.describe(64).startswith(f"{strategy}, on the {path} flow: T=1000")


def perfect_velocity(flow):
    """E[v | x_s] where every pixel of the data is N(MEAN, SPREAD^2)."""

    def velocity(x, s):
        alpha, sigma, d_alpha, d_sigma = flow.coefficients(s, x)
        variance = alpha**2 * SPREAD**2 + sigma**2
        ratio = (alpha * d_alpha * SPREAD**2 + sigma * d_sigma) / variance
        return d_alpha * MEAN + ratio * (x - alpha * MEAN)

    return velocity


def sampled_moments(flow, num_steps, **settings):
    """(mean, standard deviation) of the samples: every step is affine in x and in its noise, so a few images tell them."""
    basis = jnp.arange(num_steps + 2)
    noise = lambda k: (basis == k).astype(float).reshape(-1, 1, 1, 1)  # noqa: E731
    start = (basis == num_steps).astype(float).reshape(-1, 1, 1, 1)
    out = sample_flow(perfect_velocity(flow), start, flow, noise, num_steps=num_steps, **settings).squeeze()
    return float(out[-1]), float(jnp.sqrt(((out[:-1] - out[-1]) ** 2).sum()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("sde", 1)])
def test_order_of_convergence(path, sampler, order):
    assert sampler in FLOW_SAMPLERS
    flow = FlowMatching(path)
    errors = []
    # The sde's last step of 0.04 is an error of its own; below 25 steps it is one of the steps.
    counts = (6, 12, 24) if sampler == "sde" else (40, 80, 160)
    for num_steps in counts:
        mean, spread = sampled_moments(flow, num_steps, sampler=sampler)
        errors.append(abs(mean - MEAN) + abs(spread - SPREAD))
    slope = np.log2(errors[-2] / errors[-1])
    assert errors[-1] < 0.05 and slope > order - 0.35, (errors, slope)
    if sampler != "sde":
        # Its constants fall, too, with the length of the last step.
        assert slope < order + 0.35, (errors, slope)


def test_clipping_bounds_the_images():
    flow = FlowMatching("linear")
    x = 3 * jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    for sampler in FLOW_SAMPLERS:
        out = sample_flow(lambda x, s: 10 * x, x, flow, jnp.zeros_like, sampler=sampler, num_steps=8, clip=True)
        assert np.isfinite(out).all()
        if sampler == "euler":
            np.testing.assert_array_less(np.abs(out), 1 + 1e-12)
