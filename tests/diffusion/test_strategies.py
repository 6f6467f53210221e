"""Densities that change over training: against their formulas, sequential float64 oracles and their own draws."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.strategies import CurriculumStrategy, GradientNoiseStrategy, LossSecondMomentStrategy
from speedit_jax.diffusion.timesteps import make_strategy

LINEAR = make_schedule("linear", 1000)
CLTS = make_strategy(LINEAR, "clts", clts_mean=300.0, clts_std=150.0, clts_steps=1000)


def assert_frequencies(t, density):
    """z-scores of the counts of independent draws: were all normal, one beyond 5.5 has a chance of T x 4e-8, and the mean of z^2
    is 1 with a standard deviation of sqrt(2 / T). Steps that are drawn fewer than 30 times are taken together."""
    t = np.asarray(t).ravel()
    counts, expected = np.bincount(t, minlength=len(density)), t.size * density
    rare = expected < 30
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    z = (counts - expected)[expected > 0] / np.sqrt(expected[expected > 0])
    assert np.abs(z).max() < 5.5
    assert abs(np.mean(z**2) - 1) < 6 * np.sqrt(2 / len(z))


def test_clts_ends_in_its_gaussian():
    t = np.arange(1000)
    gaussian = stats.norm.pdf(t, 300, 150)
    np.testing.assert_allclose(CLTS.marginal(8, 1000), gaussian / gaussian.sum(), rtol=1e-12)
    np.testing.assert_array_equal(CLTS.marginal(8, 10**6), CLTS.marginal(8, 1000))
    np.testing.assert_array_equal(CLTS.marginal(8), np.full(1000, 1 / 1000))
    np.testing.assert_allclose(CLTS.marginal(8, 250), 0.75 / 1000 + 0.25 * CLTS.marginal(8, 1000), rtol=1e-12)


def test_clts_scales_with_the_schedule():
    density = make_strategy(make_schedule("linear", 250), "clts", clts_mean=300.0, clts_std=150.0).last
    np.testing.assert_allclose(density, 4 * CLTS.last[::4], rtol=1e-3)  # a sum of 250 for one of 1000
    # A Gaussian far from every step still is a density.
    far = make_strategy(LINEAR, "clts", clts_mean=1e5, clts_std=1.0).last
    assert far.sum() == pytest.approx(1) and far[-1] == pytest.approx(1)


def test_clts_draws_by_the_step():
    sample = jax.jit(jax.vmap(lambda key, step: CLTS.sample(key, 256, step, ()), in_axes=(0, None)))
    for step in (0, 400, 1000, 5000):
        t, weight, importance = sample(jax.random.split(jax.random.key(step), 4000), jnp.int32(step))
        assert_frequencies(t, CLTS.marginal(256, step))
    np.testing.assert_array_equal(weight, 1)
    np.testing.assert_array_equal(importance, 1)
    assert CLTS.init() == CLTS.update((), t[0], weight[0]) == ()


def test_a_curriculum_carries_its_weights():
    strategy = CurriculumStrategy("two", np.array([1.0, 0.0]), np.array([0.0, 1.0]), 10, np.array([3.0, 4.0]))
    for step, weight in ((0, 3), (10, 4), (99, 4)):
        np.testing.assert_array_equal(strategy.sample(jax.random.key(0), 5, jnp.int32(step), ())[1], weight)


def test_laplace_draws_its_density():
    """Most of its steps are too rare to be counted one by one."""
    strategy = make_strategy(LINEAR, "laplace")
    sample = jax.jit(jax.vmap(lambda key: strategy.sample(key, 256, 0, ())[0]))
    assert_frequencies(sample(jax.random.split(jax.random.key(5), 4000)), strategy.marginal(256))


def test_the_log_lines():
    assert CLTS.describe(256) == ("clts: T=1000, E[t]=499.5, E[weight]=1.0000; from step 1000 on E[t]=308.2, E[weight]=1.0000")
    assert (
        make_strategy(LINEAR, "loss_second_moment", weighting="p2")
        .describe(256)
        .endswith(
            "T=1000, E[t]=499.5, E[weight]=0.7245; once every timestep has 10 losses, in proportion to their root mean square"
        )
    )


SMALL = LossSecondMomentStrategy("small", np.linspace(1, 2, 12), history=4, uniform=0.1)


@pytest.fixture(scope="module")
def update():
    return jax.jit(SMALL.update)


def batches(count, n=16):
    """Some with more losses of one timestep than are remembered."""
    rng = np.random.default_rng(0)
    for i in range(count):
        t = rng.integers(0, 12 if i % 3 else 2, n)
        yield t.astype(np.int32), rng.gamma(1, 1 + t).astype(np.float32)


def test_it_remembers_the_last_losses_of_each_timestep(update):
    state, remembered, seen = SMALL.init(), collections.defaultdict(lambda: collections.deque(maxlen=4)), np.zeros(12, int)
    for t, loss in batches(20):
        state = update(state, t, loss)
        for one, value in zip(t, loss, strict=True):
            remembered[one].append(value)
            seen[one] += 1
        np.testing.assert_array_equal(state["count"], seen)
        for one, row in enumerate(np.asarray(state["losses"])):
            expected = sorted(remembered[one]) + [0.0] * (4 - len(remembered[one]))
            np.testing.assert_array_equal(np.sort(row), np.sort(expected))


def test_density_and_importance(update):
    state, warm = SMALL.init(), False
    for t, loss in batches(30):
        p = np.asarray(SMALL.probabilities(state), np.float64)
        if (np.asarray(state["count"]) < 4).any():
            np.testing.assert_array_equal(p, np.float32(1 / 12))
        else:
            warm = True
            rms = np.sqrt((np.asarray(state["losses"], np.float64) ** 2).mean(1))
            np.testing.assert_allclose(p, 0.9 * rms / rms.sum() + 0.1 / 12, rtol=1e-6)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
        state = update(state, t, loss)
    assert warm
    values = np.arange(12.0)
    draw = jax.jit(jax.vmap(lambda key: SMALL.sample(key, 64, 0, state)))
    t, weight, importance = map(np.asarray, draw(jax.random.split(jax.random.key(3), 4000)))
    assert_frequencies(t, np.asarray(SMALL.probabilities(state), np.float64))
    np.testing.assert_allclose(weight, SMALL.weights[t], rtol=1e-6)
    np.testing.assert_allclose(importance * np.asarray(SMALL.probabilities(state))[t], 1 / 12, rtol=1e-5)
    assert importance.std() > 0.1
    # Corrected, the mean of anything is that of uniform draws: five standard errors.
    corrected = importance * values[t]
    assert abs(corrected.mean() - values.mean()) < 5 * corrected.std() / np.sqrt(corrected.size)
    assert abs(values[t].mean() - values.mean()) > 20 * corrected.std() / np.sqrt(corrected.size)


def test_warming_up_is_uniform():
    _, _, importance = SMALL.sample(jax.random.key(0), 64, 0, SMALL.init())
    np.testing.assert_allclose(importance, 1, rtol=1e-6)
    np.testing.assert_array_equal(SMALL.marginal(64), np.full(12, 1 / 12))
    published = make_strategy(LINEAR, "loss_second_moment")
    assert (published.history, published.uniform) == (10, 0.001)


def test_the_state_is_the_same_on_eight_devices(update):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(SMALL.update, in_shardings=(everywhere, rows, rows), out_shardings=everywhere)
    alone = state = SMALL.init()
    for t, loss in batches(5):
        alone, state = update(alone, t, loss), sharded(state, t, loss)
        jax.tree.map(np.testing.assert_array_equal, state, alone)
    assert len(state["losses"].sharding.device_set) == 8


NOISY = GradientNoiseStrategy("noisy", np.linspace(1, 2, 50), probe_every=7, bins=4, decay=0.75, uniform=0.1)


def test_the_density_follows_the_standard_deviation():
    assert list(NOISY.edges) == [0, 13, 25, 38, 50]
    np.testing.assert_allclose(NOISY.probabilities(NOISY.init()), 1 / 50)
    variance = np.array([4.0, 1.0, 0.0, 16.0])
    state = NOISY.learn(NOISY.init(), jnp.asarray(variance, jnp.float32))
    deviation = np.repeat(np.sqrt(variance), [13, 12, 13, 12])
    # The first measurement alone counts, however small its weight in the average is.
    np.testing.assert_allclose(NOISY.probabilities(state), 0.9 * deviation / deviation.sum() + 0.1 / 50, rtol=1e-5)
    second = np.array([1.0, 1.0, 9.0, 0.0])
    average = 0.75 * 0.25 * variance + 0.25 * second
    state = NOISY.learn(state, jnp.asarray(second, jnp.float32))
    deviation = np.repeat(np.sqrt(average), [13, 12, 13, 12])
    np.testing.assert_allclose(NOISY.probabilities(state), 0.9 * deviation / deviation.sum() + 0.1 / 50, rtol=1e-5)
    for bad in (np.nan, np.inf):
        kept = NOISY.learn(state, jnp.array([1.0, bad, 1.0, 1.0]))
        jax.tree.map(np.testing.assert_array_equal, kept, state)
    np.testing.assert_allclose(NOISY.probabilities(NOISY.learn(NOISY.init(), jnp.zeros(4))), 1 / 50)


def test_draws_from_the_measured_density_are_corrected():
    state = NOISY.learn(NOISY.init(), jnp.array([4.0, 1.0, 0.0, 16.0]))
    p = np.asarray(NOISY.probabilities(state), np.float64)
    draw = jax.jit(jax.vmap(lambda key: NOISY.sample(key, 64, 0, state)))
    t, weight, importance = map(np.asarray, draw(jax.random.split(jax.random.key(3), 4000)))
    assert_frequencies(t, p / p.sum())
    np.testing.assert_allclose(weight, NOISY.weights[t], rtol=1e-6)
    np.testing.assert_allclose(importance * p[t], 1 / 50, rtol=1e-5)
    assert importance.max() <= 10 * (1 + 1e-5)
    assert NOISY.update(state, t[0], weight[0]) is state


def test_no_density_of_parts_gives_a_batch_that_varies_less():
    """Of the mean of a quantity whose mean is 0 and whose deviation is known by part, against densities near the strategy's."""
    greedy = GradientNoiseStrategy("greedy", np.ones(40), bins=4, uniform=0.0)
    deviation = np.array([3.0, 1.0, 0.5, 2.0])
    p = np.asarray(greedy.probabilities(greedy.learn(greedy.init(), jnp.asarray(deviation**2, jnp.float32))), np.float64)[::10]

    def variance(p):  # of importance x quantity, p a timestep's chance in each part of ten
        return (10 * p * (deviation / (40 * p)) ** 2).sum()

    rng = np.random.default_rng(0)
    for _ in range(100):
        other = p * np.exp(rng.normal(0, 0.3, 4))
        assert variance(other / (10 * other.sum())) > variance(p)
    assert variance(p) < 0.8 * variance(np.full(4, 1 / 40))


def test_a_probe_covers_every_part_evenly():
    t, weight = jax.vmap(lambda key: NOISY.probe(key, 16))(jax.random.split(jax.random.key(0), 4000))
    part = np.searchsorted(NOISY.edges, np.asarray(t), side="right") - 1
    np.testing.assert_array_equal(part, np.broadcast_to(np.arange(16) % 8 // 2, part.shape))
    np.testing.assert_allclose(weight, NOISY.weights[np.asarray(t)], rtol=1e-6)
    widths = np.diff(NOISY.edges)
    assert_frequencies(t, np.repeat(1 / (4 * widths), widths))


def test_the_log_line_of_gradient_noise():
    assert make_strategy(LINEAR, "gradient_noise").describe(256) == (
        "gradient_noise: T=1000, E[t]=499.5, E[weight]=1.0000; in proportion to the standard deviation of the gradient,"
        " measured in 8 parts every 100 steps"
    )
    assert make_strategy(make_schedule("squaredcos_cap_v2", 5), "gradient_noise").bins == 5
