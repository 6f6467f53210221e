"""The initial state, its sharding, and the learning rate."""

import jax
import numpy as np
import optax
import pytest
import tiny
from tiny import MESHES, ONE

from speedit_jax.errors import UserError
from speedit_jax.training.checkpoint import arrays
from speedit_jax.training.state import initial_state, learning_rate


def initial_arrays(shape):
    trainer = tiny.make_trainer(shape)
    init = jax.jit(
        lambda key: initial_state(trainer.model, trainer.optimizer, trainer.strategy, key), out_shardings=trainer.shardings
    )
    with jax.set_mesh(trainer.mesh):
        state = init(jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, state) == trainer.shardings
    return arrays(state)


@pytest.fixture(scope="module")
def on_one_device():
    return initial_arrays(ONE)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_initial_state_is_the_same_on_every_mesh(shape, on_one_device):
    tiny.assert_same(initial_arrays(shape), on_one_device)


def test_initial_state(on_one_device):
    state = on_one_device
    assert state["step"] == state["skipped"] == state["skipped_in_a_row"] == 0
    params = {name.removeprefix("params/"): value for name, value in state.items() if name.startswith("params/")}
    assert len(params) == 21
    for name, value in params.items():
        np.testing.assert_array_equal(state[f"ema/{name}"], value)
        # adaLN-Zero: these are zero; biases are too. All else is drawn.
        zero = name.endswith("bias") or name in ("blocks/adaLN/kernel", "final_adaLN/kernel", "final/kernel")
        assert (np.std(value) == 0) == zero, name
    assert all(not value.any() for name, value in state.items() if name.startswith("opt/"))


def test_moments_are_sharded_like_their_parameters():
    trainer = tiny.make_trainer((2, 2, 2))
    adam = [s for s in jax.tree.leaves(trainer.shardings.opt, is_leaf=_is_adam) if _is_adam(s)]
    assert len(adam) == 1
    assert adam[0].mu == adam[0].nu == trainer.shardings.params == trainer.shardings.ema
    assert adam[0].count.is_fully_replicated
    # Ten kernels, the label table, and the biases of the heads and of the MLP's hidden width.
    assert sum(not s.is_fully_replicated for s in jax.tree.leaves(adam[0].mu)) == 13


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def rates(**changes):
    config = tiny.make_config(optim__learning_rate=1e-3, training__num_steps=100, **changes)
    schedule = learning_rate(config)
    return lambda step: float(schedule(step))


def test_constant_learning_rate():
    rate = rates()
    assert rate(0) == rate(99) == pytest.approx(1e-3)


def test_warmup():
    rate = rates(optim__warmup_steps=10)
    # From lr / n in even steps to lr: the first step counts, and the last is no jump.
    for step in range(10):
        assert rate(step) == pytest.approx(1e-4 + step * 9e-4 / 10, rel=1e-6)
    assert rate(10) == rate(99) == pytest.approx(1e-3)


def test_cosine():
    rate = rates(optim__schedule="cosine", optim__warmup_steps=20)
    assert rate(0) == pytest.approx(1e-3 / 20)
    for step in (20, 40, 60, 99):
        # float32 cancels in 1 + cos: 1e-7 of the rate at the start.
        assert rate(step) == pytest.approx(1e-3 * (1 + np.cos(np.pi * (step - 20) / 80)) / 2, abs=1e-10)
    assert rate(60) == pytest.approx(5e-4)
    assert rate(100) == pytest.approx(0, abs=1e-9)


def test_cosine_without_warmup():
    rate = rates(optim__schedule="cosine")
    assert (rate(0), rate(50), rate(100)) == pytest.approx((1e-3, 5e-4, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__schedule": "linear"}, "unknown optim.schedule 'linear'; choose one of constant, cosine"),
        ({"optim__warmup_steps": 100}, "optim.warmup_steps=100 must be below training.num_steps=100"),
    ],
)
def test_learning_rate_errors(changes, message):
    with pytest.raises(UserError, match=message):
        rates(**changes)
