"""The train step: what it draws, what it computes, and what a bad batch may change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BATCH, MESHES, ONE

from speedit_jax.diffusion.timesteps import TableStrategy
from speedit_jax.models.build import Model
from speedit_jax.training import assembly
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.inputs import drop_conditions, stream
from speedit_jax.training.state import learning_rate
from speedit_jax.training.step import by_quarter, ema_decay, make_loss, microbatches

KEY = jax.random.key(7)


class Recording(TableStrategy):
    """Remembers what it was told of the last step, and how often."""

    def init(self):
        return {"t": jnp.zeros(BATCH, jnp.int32), "loss": jnp.zeros(BATCH), "updates": jnp.zeros((), jnp.int32)}

    def update(self, state, t, loss):
        return {"t": t, "loss": loss, "updates": state["updates"] + 1}


def recording(**changes) -> Recording:
    config = tiny.make_config(**changes)
    return Recording(**vars(assembly.make_strategy(config, assembly.make_diffusion(config))))


# What the step draws, seen through a stand-in for the network: its output for an image with label r is row r of its only
# parameter. At zero, the gradient of mean (noise - output)^2 in row r is -2 noise_r / (pixels * batch) where image r kept
# its label, and SGD at the rate pixels * batch / 2 turns the parameter into the noise: exactly, all being powers of two.
SIDE = 4
ROWS = BATCH + 1  # the last one is the null label's


def stand_in() -> Model:
    return tiny.make_model(
        lambda key: {"rows": jnp.zeros((ROWS, SIDE, SIDE, 1))},
        axes={"rows": (None,) * 4},
        apply=lambda params, x, t, y: params["rows"][y],
        num_classes=BATCH,
        null_label=BATCH,
    )


@functools.cache
def drawn(shape, accumulation: int, label_dropout: float = 0.0, steps: int = 1):
    """(noise by row, {"t", "loss"}) of the last of some steps."""
    changes = {
        "diffusion__variance": "fixed_small",
        "timesteps__weighting": "none",
        "model__label_dropout": label_dropout,
        "training__accumulation": accumulation,
    }
    sgd = optax.sgd(SIDE * SIDE * BATCH / 2)
    trainer = tiny.make_trainer(shape, model=stand_in(), strategy=recording(**changes), optimizer=sgd, **changes)
    zeros = {"rows": np.zeros((ROWS, SIDE, SIDE, 1), np.float32)}
    batch = {"image": np.zeros((BATCH, SIDE, SIDE, 1), np.float32), "label": np.arange(BATCH, dtype=np.int32)}
    # Optimised, as for users: otherwise loops of other lengths round otherwise.
    step, state = trainer.train_step({"xla_backend_optimization_level": 3}), trainer.state(zeros)
    for _ in range(steps):
        state, _ = step(dataclasses.replace(state, params=trainer.state(zeros).params), batch, KEY)
    return np.asarray(state.params["rows"]), jax.tree.map(np.asarray, state.timesteps)


@pytest.mark.parametrize(
    ("shape", "accumulation"), [(ONE, 2), (ONE, 4), *((shape, 1) for shape in MESHES), ((2, 2, 2), 4)], ids=str
)
def test_draws_depend_on_neither_mesh_nor_accumulation(shape, accumulation):
    noise, seen = drawn(shape, accumulation)
    whole_noise, whole_seen = drawn(ONE, 1)
    tiny.assert_same(noise, whole_noise)
    tiny.assert_same(seen["t"], whole_seen["t"])
    # The strategy hears of each example's loss in the order of its timesteps.
    np.testing.assert_allclose(seen["loss"], (noise[:BATCH] ** 2).mean((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_draws_are_those_of_the_steps_key(steps):
    noise, seen = drawn(ONE, 1, steps=steps)
    key = jax.random.fold_in(KEY, steps - 1)
    np.testing.assert_allclose(noise[:BATCH], jax.random.normal(stream(key, "noise"), (BATCH, SIDE, SIDE, 1)), rtol=1e-6)
    t, _, _ = recording().sample(stream(key, "timesteps"), BATCH, jnp.int32(steps - 1), None)
    np.testing.assert_array_equal(seen["t"], t)
    assert seen["updates"] == steps


def test_dropped_labels_become_the_null_label():
    noise, _ = drawn(ONE, 1, label_dropout=0.5)
    whole, _ = drawn(ONE, 1)
    key = stream(jax.random.fold_in(KEY, 0), "label_dropout")
    dropped = np.asarray(jax.random.bernoulli(key, 0.5, (BATCH,)))
    assert 0 < dropped.sum() < BATCH
    np.testing.assert_array_equal(noise[:BATCH], np.where(dropped[:, None, None, None], 0, whole[:BATCH]))
    np.testing.assert_allclose(noise[BATCH], whole[:BATCH][dropped].sum(0), atol=1e-5)


def test_drop_labels_rate():
    y = jnp.arange(100_000) % 10
    for rate in (0.0, 0.1, 0.5):
        out = np.asarray(drop_conditions(KEY, y, rate, 10))
        dropped = out == 10
        # Five standard deviations of a binomial.
        assert abs(dropped.mean() - rate) <= 5 * (rate * (1 - rate) / len(y)) ** 0.5
        np.testing.assert_array_equal(out[~dropped], np.asarray(y)[~dropped])


def test_drop_labels_without_a_null_label():
    y = jnp.arange(5)
    assert drop_conditions(KEY, y, 0.5, None) is y


def test_streams_are_distinct_and_unknown_names_fail():
    names = ("timesteps", "noise", "label_dropout")
    assert len({jax.random.key_data(stream(KEY, name)).tobytes() for name in names}) == 3
    # Part of the format of a run: its draws change if these are renumbered.
    for number, name in enumerate(names):
        tiny.assert_same(jax.random.key_data(stream(KEY, name)), jax.random.key_data(jax.random.fold_in(KEY, number)))
    with pytest.raises(KeyError):
        stream(KEY, "dropout")


def test_microbatches_keep_rows_on_their_devices():
    parts = np.asarray(microbatches(jnp.arange(24).reshape(8, 3), 2))
    assert parts[:, :, 0].tolist() == [[0, 6, 12, 18], [3, 9, 15, 21]]


def test_ema_decay():
    step = jnp.arange(0, 100_000, 997)
    assert float(ema_decay(0.999, False, jnp.int32(0))) == np.float32(0.999)
    expected = np.minimum(0.999, (1 + np.asarray(step)) / (10 + np.asarray(step)))
    np.testing.assert_allclose(ema_decay(0.999, True, step), expected, rtol=1e-6)
    assert float(ema_decay(0.999, True, jnp.int32(0))) == pytest.approx(0.1)


# From here on the real network, on one device.


@pytest.fixture(scope="module")
def trainer():
    changes = {
        "training__ema_decay": 0.9,
        "training__ema_warmup": True,
        "training__extra_ema_decays": (0.05,),
        "optim__warmup_steps": 10,
        "optim__weight_decay": 0.1,
    }
    return tiny.make_trainer(strategy=recording(), **changes)


@pytest.fixture(scope="module")
def step(trainer):
    return trainer.train_step()


@pytest.fixture(scope="module")
def start(trainer):
    return trainer.state(tiny.random_like(trainer.shapes.params))


def test_loss_is_the_mean_of_weighted_mse_and_vb(trainer, start):
    rng = np.random.default_rng(3)
    batch = {
        "x0": tiny.random_batch()["image"],
        "noise": rng.normal(size=(BATCH, *tiny.IMAGE)).astype(np.float32),
        "t": rng.integers(0, 1000, BATCH),
        "weight": rng.uniform(0.1, 2, BATCH).astype(np.float32),
        "importance": rng.uniform(0.1, 2, BATCH).astype(np.float32),
        "y": tiny.random_batch()["label"],
    }

    def both(params, batch):
        x_t = trainer.diffusion.q_sample(batch["x0"], batch["t"], batch["noise"])
        output = trainer.model.apply(params, x_t, batch["t"], batch["y"])
        terms = trainer.diffusion.losses(output, batch["x0"], x_t, batch["t"], batch["noise"])
        return make_loss(trainer.model, trainer.diffusion)(params, batch), terms

    with jax.set_mesh(trainer.mesh):
        (loss, each), terms = jax.jit(both)(start.params, batch)
    terms = {name: np.asarray(value, np.float64) for name, value in terms.items()}
    expected = batch["weight"] * terms["mse"] + terms["vb"]
    np.testing.assert_allclose(loss, (batch["importance"] * expected).mean(), rtol=1e-6)
    assert each.keys() == {"mse", "vb", "loss"}
    for name, value in each.items():
        np.testing.assert_allclose(value, (terms | {"loss": expected})[name], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [4, 250, 1000])
def test_by_quartile(num_steps):
    rng = np.random.default_rng(0)
    t, terms = rng.integers(0, num_steps, 64), {name: rng.gamma(1, size=64).astype(np.float32) for name in ("mse", "loss", "vb")}
    means = by_quarter(jnp.asarray(t), num_steps, terms)
    assert len(means) == 8
    for name in ("mse", "loss"):
        for q in range(4):
            inside = (t >= q * num_steps / 4) & (t < (q + 1) * num_steps / 4)
            np.testing.assert_allclose(means[f"{name}_q{q + 1}"], terms[name][inside].mean(), rtol=1e-6)


def test_a_quartile_without_examples_has_no_mean():
    terms = {"mse": jnp.array([1.0, 3.0, jnp.nan]), "loss": jnp.ones(3)}
    means = {name: float(value) for name, value in by_quarter(jnp.array([0, 100, 999]), 1000, terms).items()}
    assert means["mse_q1"] == 2 and means["loss_q4"] == 1
    # The last is not finite, and no other quartile's is.
    assert all(np.isnan(means[name]) for name in ("mse_q2", "loss_q2", "mse_q3", "mse_q4"))


def test_step(trainer, step, start):
    state, metrics = start, None
    schedule = learning_rate(trainer.config)
    for n in range(3):
        before = state
        state, metrics = step(state, tiny.random_batch(n), KEY)
        assert int(state.step) == n + 1
        np.testing.assert_allclose(metrics["learning_rate"], schedule(n), rtol=1e-6)
        # The closed form of the averages, with float32's rounding of weights and decay.
        averages = (
            (min(0.9, (1 + n) / (10 + n)), before.ema, state.ema),
            (0.05, before.extra_ema["0.05"], state.extra_ema["0.05"]),
        )
        for decay, old, new in averages:
            expected = jax.tree.map(lambda e, p, d=decay: d * np.asarray(e) + (1 - d) * np.asarray(p), old, state.params)
            for ema, value in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(ema, value, rtol=1e-5, atol=1e-7)
        assert all(change > 0 for change in tiny.relative_errors(state.params, before.params).values())
    quarters = {f"{name}_q{q}" for name in ("mse", "loss") for q in range(1, 5)}
    others = {"loss", "mse", "vb", "grad_norm", "param_norm", "learning_rate", "skipped", "skipped_in_a_row"}
    assert set(metrics) == others | quarters
    squares = sum((np.asarray(p, np.float64) ** 2).sum() for p in jax.tree.leaves(state.params))
    np.testing.assert_allclose(metrics["param_norm"], squares**0.5, rtol=1e-5)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == state.skipped == 0
    assert state.timesteps["updates"] == 3


def test_reported_loss_and_learning_from_it(trainer, step, start):
    state, metrics = step(start, tiny.random_batch(), KEY)
    np.testing.assert_allclose(metrics["loss"], state.timesteps["loss"].mean(), rtol=1e-6)
    first = float(metrics["loss"])
    for _ in range(10):
        state, metrics = step(state, tiny.random_batch(), KEY)
    assert float(metrics["loss"]) < first


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_bad_batch_changes_only_the_counters(step, start, poison):
    good = tiny.random_batch()
    bad = tiny.random_batch()
    bad["image"][3, 2, 1, 0] = poison
    before, _ = step(start, good, KEY)
    after, metrics = step(before, bad, KEY)
    assert not np.isfinite(metrics["loss"])
    counters = {"step": 2, "skipped": 1, "skipped_in_a_row": 1}
    assert {name: int(getattr(after, name)) for name in counters} == counters
    untouched = dataclasses.replace(after, **{name: getattr(before, name) for name in counters})
    tiny.assert_same(untouched, before)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)

    after, _ = step(after, bad, KEY)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (2, 2)
    after, metrics = step(after, good, KEY)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"])
    # The optimizer has taken two steps; the schedule counts those, not the bad ones. (lr / 10 + one tenth of 0.9 lr)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-4 * (0.1 + 0.09), rtol=1e-6)
    assert after.timesteps["updates"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_step_is_a_pure_function(trainer, step, start, tmp_path):
    """Steps 0..5 in one go, and 3..5 from a checkpoint of step 3, give the same bits."""
    checkpoints = Checkpoints(tmp_path, create=True)
    state, log = start, []
    for n in range(6):
        if n == 3:
            checkpoints.save(n, state, {})
            third = state
        state, metrics = step(state, tiny.random_batch(n), KEY)
        log.append(metrics)
    checkpoints.wait()

    tiny.assert_same(step(third, tiny.random_batch(3), KEY)[1], log[3])  # again, out of turn
    resumed = checkpoints.restore(3, trainer.shapes, trainer.shardings)
    checkpoints.close()
    tiny.assert_same(resumed, third)
    for n in range(3, 6):
        resumed, metrics = step(resumed, tiny.random_batch(n), KEY)
        tiny.assert_same(metrics, log[n])
    tiny.assert_same(resumed, state)


def test_another_seed_draws_otherwise(step, start):
    losses = {float(step(start, tiny.random_batch(), jax.random.key(seed))[1]["loss"]) for seed in range(3)}
    assert len(losses) == 3
