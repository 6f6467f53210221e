"""Training with a strategy that measures gradients: the measurement, when it is made, and that all meshes make the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import BATCH, ONE

from speedit_jax.errors import UserError
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.step import gradient_variance

KEY, STEPS, EVERY, LEVELS = jax.random.key(7), 5, 2, 24


def test_the_variance_is_that_of_one_examples_gradient():
    """Gradients of w.x are x: normal, with a variance of their own in each pair and a mean that must not count."""
    pairs, size, width, rounds = 3, 4, 5, 2000
    deviation = np.array([0.5, 1.0, 3.0])
    rows = np.arange(2 * pairs * size)
    x = np.random.default_rng(0).normal(10.0, deviation[rows % (2 * pairs) // 2][:, None], (rounds, len(rows), width))

    def loss(params, batch):
        return (batch["x"] @ params).mean(), {}

    batch = {"x": jnp.asarray(x, jnp.float32), "t": jnp.zeros((rounds, len(rows)))}
    found = jax.jit(jax.vmap(lambda b: gradient_variance(loss, jnp.zeros(width), b, pairs)))(batch)
    # Each is deviation^2 times a chi-squared number of `width` degrees: five standard errors of the mean.
    np.testing.assert_allclose(found.mean(0), width * deviation**2, rtol=5 * np.sqrt(2 / width / rounds))


@functools.cache
def trainer(shape, accumulation: int = 1, **changes):
    """The network is a stand-in whose output is one parameter: its gradient is small where x_t says nothing of the noise."""
    model = tiny.make_model(
        lambda key: {"scale": jnp.zeros(())},
        axes={"scale": ()},
        apply=lambda params, x, t, y: params["scale"] * x,
    )
    changes = {
        "diffusion__num_steps": LEVELS,
        "diffusion__variance": "fixed_small",
        "timesteps__strategy": "gradient_noise",
        "timesteps__probe_every": EVERY,
        "training__accumulation": accumulation,
        **changes,
    }
    made = tiny.make_trainer(shape, model=model, **changes)
    return made, made.train_step()


@functools.cache
def trained(shape, accumulation: int = 1):
    made, step = trainer(shape, accumulation)
    state, log = made.state({"scale": np.zeros((), np.float32)}), []
    for n in range(STEPS):
        state, _ = step(state, tiny.random_batch(n), KEY)
        log.append(jax.tree.map(np.asarray, state.timesteps))
    return state, log


def test_it_measures_when_due_and_the_density_follows():
    _, log = trained(ONE)
    assert [int(entry["probes"]) for entry in log] == [1, 1, 2, 2, 3]
    np.testing.assert_array_equal(log[0]["variance"], log[1]["variance"])
    assert (log[1]["variance"] != log[2]["variance"]).all()
    made, _ = trainer(ONE)
    assert np.asarray(made.strategy.probabilities(log[0])).std() > 0


def test_the_first_measurement_is_the_definition():
    """At scale 0 the gradient of an example is -2 mean(x_t noise), of which the noise's part grows with t."""
    made, step = trainer(ONE)
    measured = []
    for seed in range(40):
        state, _ = step(made.state({"scale": np.zeros((), np.float32)}), tiny.random_batch(seed), jax.random.key(seed))
        measured.append(np.asarray(state.timesteps["variance"]) / (1 - made.strategy.decay))
    rng, schedule = np.random.default_rng(0), made.diffusion.schedule
    edges = made.strategy.edges
    for part, found in enumerate(np.mean(measured, 0)):
        t = rng.integers(edges[part], edges[part + 1], 4000)
        pixels = int(np.prod(tiny.IMAGE))
        image, noise = rng.uniform(-1, 1, (4000, pixels)), rng.normal(size=(4000, pixels))
        x_t = np.sqrt(schedule.alphas_cumprod[t])[:, None] * image + schedule.sigmas[t][:, None] * noise
        # 40 estimates of one degree of freedom each: a deviation of sqrt(2 / 40), of which these are four.
        np.testing.assert_allclose(found, np.var(-2 * (x_t * noise).mean(1)), rtol=4 * np.sqrt(2 / 40))


@pytest.mark.parametrize("shape, accumulation", [((8, 1, 1), 1), ((2, 2, 2), 1), ((2, 2, 2), 4)], ids=str)
def test_one_density_on_every_mesh(shape, accumulation):
    state, _ = trained(shape, accumulation)
    alone, _ = trained(ONE)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.timesteps))
    # Differences of sums in another order: of numbers that nearly cancel at worst.
    np.testing.assert_allclose(state.timesteps["variance"], alone.timesteps["variance"], rtol=1e-4)


def test_checkpoints_hold_the_measurements(tmp_path):
    made, step = trainer(ONE)
    state, _ = trained(ONE)
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save(STEPS, state, {})
    checkpoints.wait()
    resumed = checkpoints.restore(STEPS, made.shapes, made.shardings)
    checkpoints.close()
    batch = tiny.random_batch(STEPS)
    tiny.assert_same(step(resumed, batch, KEY), step(state, batch, KEY))


def test_a_bad_batch_leaves_the_measurements_alone():
    made, step = trainer(ONE)
    before = dataclasses.replace(made.state({"scale": np.zeros((), np.float32)}), timesteps=trained(ONE)[0].timesteps)
    bad = tiny.random_batch()
    bad["image"][3, 2, 1, 0] = np.nan
    tiny.assert_same(step(before, bad, KEY)[0].timesteps, trained(ONE)[0].timesteps)


def test_the_batch_divides_over_the_parts():
    assert BATCH == 16
    with pytest.raises(UserError, match=r"training\.batch_size=24: .*gradient_noise wants a multiple of 16"):
        trainer(ONE, training__batch_size=24)


def test_where_devices_share_a_kernel_they_divide_the_measured_microbatches():
    with pytest.raises(UserError, match=r"training\.batch_size=16: .*microbatches of 1.*8 devices.*a multiple of 128"):
        tiny.make_trainer((8, 1, 1), model__name="DiG-tiny/2", timesteps__strategy="gradient_noise")
