"""The initial state, its sharding, and the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import MESHES, ONE

from speedit_jax.errors import UserError
from speedit_jax.training.checkpoint import arrays
from speedit_jax.training.state import decays, initial_state, learning_rate, make_optimizer


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


@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_which_parameters_decay(name):
    """Parameters are stacked over layers, so a bias has two axes as a matrix has: against a list, by name."""
    kernels = {
        "DiT": ["adaLN", "attention/out", "attention/qkv", "mlp/down", "mlp/up"],
        "DiG": [
            "adaLN",
            *(f"attention/{part}" for part in ("gate_down", "gate_up", "k", "out", "q", "r", "v")),
            "mlp/down",
            "mlp/up",
        ],
    }[name[:3]]
    prefixes = {"DiT": ["blocks"], "DiG": [f"blocks/block_{i}" for i in range(4)]}[name[:3]]
    around = ["final", "final_adaLN", "patch", "timestep/hidden", "timestep/out"]
    expected = {f"{module}/kernel" for module in around + [f"{p}/{k}" for p in prefixes for k in kernels]}
    # SPRINT's fusion is a kernel that does not.
    sprint = {"tokens__method": "sprint", "tokens__pattern": "cells", "tokens__start": 1, "tokens__tail": 1}
    params = tiny.make_trainer(model__name=name, model__depth=4, model__qk_norm=name == "DiT-tiny/2", **sprint).shapes.params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves if decays("matrices", path)}
    assert decayed == expected
    assert all(decays("all", path) for path, _ in leaves)


@pytest.mark.parametrize("mask", ["auto", "matrices", "all"])
def test_decay_against_optax(mask):
    """One update of ours and of optax.adamw with its own mask, and the form of the state is the same for all."""
    params = {"a": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}, "label": {"table": jnp.full((4, 2), 2.0)}}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    ours = make_optimizer(tiny.make_config(optim__weight_decay=0.3, optim__decay_mask=mask, optim__clip_norm=0.0))
    mine = {"a": {"kernel": True, "bias": mask == "all"}, "label": {"table": mask == "all"}}
    theirs = optax.adamw(optax.constant_schedule(1e-4), weight_decay=0.3, mask=mine)
    updates = [optimizer.update(grads, optimizer.init(params), params)[0] for optimizer in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
    plain = optax.adamw(optax.constant_schedule(1e-4))
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(plain.init(params))


def test_without_decay_the_optimizer_is_optax_adamw():
    params = {"a": {"kernel": jnp.full((2, 3), 2.0)}}
    ours = make_optimizer(tiny.make_config(optim__clip_norm=0.0))
    lowered = [
        jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
        for optimizer in (ours, optax.adamw(learning_rate(tiny.make_config()), weight_decay=0.0))
    ]
    assert lowered[0] == lowered[1]


def test_an_unknown_mask():
    with pytest.raises(UserError, match=r"unknown optim.decay_mask 'matrix'; choose one of auto, matrices, all"):
        make_optimizer(tiny.make_config(optim__decay_mask="matrix"))


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
