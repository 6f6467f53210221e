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
    # It stays the flow's own time, whatever the scale of its noise; JiT's is more noisy than SD3's.
    scaled = FlowMatching("linear", num_steps=200, noise_scale=2.0)
    published = [make_flow_strategy(of, VP, 64, strategy="logit_normal", logit_mean=0.8, logit_std=0.8) for of in (flow, scaled)]
    np.testing.assert_allclose(published[1].density, published[0].density, atol=1e-12)
    times = 1 - (np.arange(200) + 0.5) / 200
    z = np.random.default_rng(0).normal(-0.8, 0.8, 100_000)
    assert published[0].density @ times == pytest.approx((1 / (1 + np.exp(-z))).mean(), abs=2e-3)
    # The velocity's own weight, stated for epsilon, is 1 for the velocity.
    np.testing.assert_allclose(make_flow_strategy(flow, VP, 64, strategy="uniform", weighting="flow").weights, 1)


@pytest.mark.parametrize("strategy", ["speedit", "speed_cvpr25"])
@pytest.mark.parametrize(("path", "noise_scale"), [("linear", 1.0), ("gvp", 1.0), ("linear", 2.0), ("gvp", 0.5)])
def test_speedit_and_speed_do_the_same_at_the_same_noise(path, noise_scale, strategy):
    """The mass and the mean weight between two noise-to-signal ratios are those of the diffusion."""
    flow = FlowMatching(path, noise_scale=noise_scale)
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
        noise = flow.noise_scale**2
        variance = alpha**2 * SPREAD**2 + sigma**2 * noise
        ratio = (alpha * d_alpha * SPREAD**2 + sigma * d_sigma * noise) / variance
        return d_alpha * MEAN + ratio * (x - alpha * MEAN)

    return velocity


def perfect_image(flow):
    """E[x_0 | x_s] of the same data."""

    def image(x, s):
        alpha, sigma, _, _ = flow.coefficients(s, x)
        variance = alpha**2 * SPREAD**2 + (flow.noise_scale * sigma) ** 2
        return MEAN + alpha * SPREAD**2 / variance * (x - alpha * MEAN)

    return image


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@pytest.mark.parametrize("path", PATHS)
def test_both_targets_have_the_same_minimiser(path, noise_scale):
    """The velocity that the expected image gives is the expected velocity, where nothing is clamped; and back."""
    x0, noise, _ = batch()
    s = jnp.asarray([0.0, 0.1, 0.5, 0.9, 0.94])
    flow = FlowMatching(path, predicts_x0=True, noise_scale=noise_scale)
    x = flow.q_sample(x0, s, noise)
    image, velocity = perfect_image(flow)(x, s), perfect_velocity(flow)(x, s)
    v, n = flow.velocity_and_noise(image, x, s)
    np.testing.assert_allclose(v, velocity, atol=1e-12)
    for got, expected in zip(flow.x0_and_noise(v, x, s), (image, n), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)
    # One error is one loss, whichever of the two it is made in.
    twin = FlowMatching(path, noise_scale=noise_scale)
    losses = [flow.losses(image, x0, x, s, noise)["mse"], twin.losses(velocity, x0, x, s, noise)["mse"]]
    np.testing.assert_allclose(*losses, rtol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_near_the_image_the_division_is_clamped(path):
    x0, noise, _ = batch()
    s = jnp.asarray([0.9, 0.96, 0.99, 0.999, 1.0])
    flow = FlowMatching(path, predicts_x0=True, clamp=0.05)
    x = flow.q_sample(x0, s, noise)
    _, sigma, _, _ = PATHS[path](np.asarray(s), np)
    d = {"linear": 1.0, "gvp": np.pi / 2}[path]
    expected = (0.1 * d / np.maximum(sigma, 0.05)) ** 2
    np.testing.assert_allclose(flow.losses(x0 + 0.1, x0, x, s, noise)["mse"], expected, rtol=1e-9)
    np.testing.assert_allclose(flow.losses(x0, x0, x, s, noise)["mse"], 0, atol=1e-20)


@pytest.mark.parametrize("predicts_x0", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_what_an_error_of_the_noise_is_worth(path, predicts_x0):
    """Of every level: an estimate of eps that is off by 1 makes an mse of 1 / worth, in what the network predicts."""
    flow = FlowMatching(path, num_steps=40, predicts_x0=predicts_x0, noise_scale=2.0)
    s = jnp.asarray(1 - (np.arange(40) + 0.5) / 40)
    x0, noise = jax.random.normal(jax.random.key(0), (2, 40, 2, 2, 1))
    x = flow.q_sample(x0, s, noise)
    alpha, sigma, d_alpha, d_sigma = flow.coefficients(s, x)
    off = noise + 1
    image = (x - sigma * 2.0 * off) / alpha
    output = image if predicts_x0 else d_alpha * image + d_sigma * 2.0 * off
    np.testing.assert_allclose(1 / flow.losses(output, x0, x, s, noise)["mse"], flow.worth, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_a_noise_scale_is_a_path_of_scaled_images(path):
    x0, noise, s = batch()
    flow, plain = FlowMatching(path, noise_scale=2.0), FlowMatching(path)
    np.testing.assert_allclose(flow.q_sample(x0, s, noise), 2 * plain.q_sample(x0 / 2, s, noise), atol=1e-15)
    abar = [of.schedule.alphas_cumprod for of in (flow, plain)]
    log_snr = [np.log(a / (1 - a)) for a in abar]
    np.testing.assert_allclose(log_snr[0], log_snr[1] - 2 * np.log(2), atol=1e-9)
    np.testing.assert_allclose(flow.time_of(np.sqrt(1 / abar[0] - 1)), 1 - (np.arange(1000) + 0.5) / 1000, atol=1e-9)
    for sampler in FLOW_SAMPLERS:
        drawn = [
            sample_flow(
                lambda x, s, a=a: a * jnp.sin(x / a),
                x0,
                of,
                lambda k: jnp.cos(k + noise),
                sampler=sampler,
                num_steps=7,
            )
            for a, of in ((2.0, flow), (1.0, plain))
        ]
        np.testing.assert_allclose(drawn[0], 2 * drawn[1], atol=1e-13)


def perfect(flow):
    return perfect_image(flow) if flow.predicts_x0 else perfect_velocity(flow)


def sampled_moments(flow, num_steps, **settings):
    """(mean, standard deviation) of the samples: every step is affine in x and in its noise, so a few images tell them."""
    basis = jnp.arange(num_steps + 2)
    noise = lambda k: (basis == k).astype(float).reshape(-1, 1, 1, 1)  # noqa: E731
    start = (basis == num_steps).astype(float).reshape(-1, 1, 1, 1)
    out = sample_flow(perfect(flow), start, flow, noise, num_steps=num_steps, **settings).squeeze()
    return float(out[-1]), float(jnp.sqrt(((out[:-1] - out[-1]) ** 2).sum()))


# Whatever it is told by: a velocity or, without a clamp to speak of, an image; and with noise of another scale.
@pytest.mark.parametrize("told", [{}, {"predicts_x0": True, "clamp": 1e-12}, {"noise_scale": 0.5}], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("sde", 1)])
def test_order_of_convergence(path, sampler, order, told):
    assert sampler in FLOW_SAMPLERS
    flow = FlowMatching(path, **told)
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


@pytest.mark.parametrize("predicts_x0", [False, True])
def test_clipping_bounds_the_images(predicts_x0):
    flow = FlowMatching("linear", predicts_x0=predicts_x0, clamp=0.01)
    x = 3 * jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    for sampler in FLOW_SAMPLERS:
        out = sample_flow(lambda x, s: 10 * x, x, flow, jnp.zeros_like, sampler=sampler, num_steps=8, clip=True)
        assert np.isfinite(out).all()
        if sampler == "euler":
            np.testing.assert_array_less(np.abs(out), 1 + 1e-12)
