"""Training with a strategy that remembers losses: one memory on every mesh, in every checkpoint, untouched by a bad batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import BATCH, ONE

from speedit_jax.training.checkpoint import Checkpoints

KEY, STEPS, LEVELS = jax.random.key(7), 4, 25


@functools.cache
def trainer(shape, accumulation: int = 1):
    """The network is a stand-in, one parameter that is its output, so that compiling takes no time."""
    model = tiny.make_model(
        lambda key: {"picture": jnp.zeros((1, *tiny.IMAGE))},
        axes={"picture": (None,) * 4},
        apply=lambda params, x, t, y: params["picture"] + 0.1 * x,
    )
    changes = {
        "diffusion__num_steps": LEVELS,
        "diffusion__variance": "fixed_small",
        "timesteps__strategy": "loss_second_moment",
        "training__accumulation": accumulation,
    }
    made = tiny.make_trainer(shape, model=model, **changes)
    return made, made.train_step()


def warm_state(made):
    """As if every level had had its losses, the later ones larger."""
    state = made.state({"picture": np.zeros((1, *tiny.IMAGE), np.float32)})
    losses = np.random.default_rng(0).gamma(2, np.arange(1, LEVELS + 1)[:, None], (LEVELS, 10)).astype(np.float32)
    timesteps = {"losses": losses, "count": np.full(LEVELS, 12, np.int32)}
    return dataclasses.replace(state, timesteps=jax.device_put(timesteps, made.shardings.timesteps))


@functools.cache
def trained(shape, accumulation: int = 1):
    made, step = trainer(shape, accumulation)
    state, log = warm_state(made), []
    for n in range(STEPS):
        state, metrics = step(state, tiny.random_batch(n), KEY)
        log.append(metrics)
    return state, log


@pytest.mark.parametrize("shape, accumulation", [((2, 2, 2), 1), ((2, 2, 2), 4)], ids=str)
def test_one_memory_on_every_mesh(shape, accumulation):
    state, log = trained(shape, accumulation)
    alone, expected = trained(ONE)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.timesteps))
    np.testing.assert_array_equal(state.timesteps["count"], alone.timesteps["count"])
    assert alone.timesteps["count"].sum() == 12 * LEVELS + STEPS * BATCH
    # Losses are sums over the image in another order.
    np.testing.assert_allclose(state.timesteps["losses"], alone.timesteps["losses"], rtol=1e-5)
    for metrics, reference in zip(log, expected, strict=True):
        np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-5)


def test_the_loss_is_corrected_and_the_memory_is_not():
    made, step = trainer(ONE)
    before = warm_state(made)
    after, metrics = step(before, tiny.random_batch(), KEY)
    new = np.asarray(after.timesteps["losses"]) != np.asarray(before.timesteps["losses"])
    levels, _ = np.nonzero(new)
    seen = np.asarray(after.timesteps["losses"])[new]
    # A timestep that came more than ten times would not leave all its losses.
    assert len(seen) == BATCH
    p = np.asarray(made.strategy.probabilities(before.timesteps))
    np.testing.assert_allclose(metrics["mse"], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (seen / (LEVELS * p[levels])).mean(), rtol=1e-5)


def test_checkpoints_hold_the_memory(tmp_path):
    made, step = trainer(ONE)
    state, _ = trained(ONE)
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save(STEPS, state, {})
    checkpoints.wait()
    for shape in (ONE, (2, 2, 2)):
        other, _ = trainer(shape)
        tiny.assert_same(checkpoints.restore(STEPS, other.shapes, other.shardings).timesteps, state.timesteps)
    resumed = checkpoints.restore(STEPS, made.shapes, made.shardings)
    checkpoints.close()
    batch = tiny.random_batch(STEPS)
    tiny.assert_same(step(resumed, batch, KEY), step(state, batch, KEY))


def test_a_bad_batch_leaves_the_memory_alone():
    made, step = trainer(ONE)
    before, bad = warm_state(made), tiny.random_batch()
    bad["image"][3, 2, 1, 0] = np.nan
    after, _ = step(before, bad, KEY)
    tiny.assert_same(after.timesteps, before.timesteps)
