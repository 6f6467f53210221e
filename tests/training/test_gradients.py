"""Gradients on every mesh are those of one device, for every leaf.

A wrong sharding can leave the loss exact and only the gradient wrong, and Adam divides a wrong scale away; so each leaf of
the gradient itself is compared, at weights that are nowhere zero.
"""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import BATCH, CLASSES, IMAGE, MESHES, ONE, TEXTS

from speedit_jax import sharding
from speedit_jax.training.step import make_gradient, make_loss


@functools.cache
def gradient(shape, x64: bool, accumulation: int = 1, text: bool = False, **changes):
    """(gradient, loss, metrics, per_example) on a mesh, on the host."""
    dtype = np.float64 if x64 else np.float32
    rng = np.random.default_rng(1)
    batch = {
        "x0": rng.uniform(-1, 1, (BATCH, *IMAGE)).astype(dtype),
        "noise": rng.normal(size=(BATCH, *IMAGE)).astype(dtype),
        "t": rng.integers(0, 1000, BATCH).astype(np.int32),
        "weight": rng.uniform(0.5, 1.5, BATCH).astype(dtype),
        "importance": rng.uniform(0.5, 1.5, BATCH).astype(dtype),
        "y": rng.integers(0, CLASSES + 1, BATCH).astype(np.int32),
    }
    if text:
        length = rng.integers(1, TEXTS.length + 1, BATCH).astype(np.int32)
        batch["y"] = {"tokens": rng.normal(size=(BATCH, TEXTS.length, TEXTS.width)).astype(dtype), "length": length}
    if changes.get("diffusion__path", "vp") != "vp":
        batch["t"] = rng.uniform(0.02, 0.98, BATCH).astype(dtype)
    if "tokens__method" in changes:
        order = rng.permuted(np.tile(np.arange(16, dtype=np.int32), (BATCH, 1)), axis=1)
        batch |= {"order": order, "inverse": np.argsort(order, axis=1).astype(np.int32)}
        batch |= {"dropped": rng.random(BATCH) < 0.3} if changes["tokens__method"] == "sprint" else {}
    with jax.enable_x64(x64):
        trainer = tiny.make_trainer(shape, texts=TEXTS if text else None, **changes)
        params = jax.device_put(tiny.random_like(trainer.shapes.params, dtype=dtype), trainer.shardings.params)
        function = jax.jit(
            make_gradient(make_loss(trainer.model, trainer.diffusion), accumulation),
            in_shardings=(trainer.shardings.params, trainer.rows),
            out_shardings=(trainer.shardings.params, None, None),
        )
        with jax.set_mesh(trainer.mesh):
            result = jax.tree.map(np.asarray, function(params, jax.device_put(batch, trainer.rows)))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(result))
    return result


# Sums over at most BATCH * 16 tokens * 128 features, added in another order: some square roots of that many roundings of
# 1e-16 and 6e-8, seen as 6e-16 and 3e-7. The fault of `test_layout_of_two_kernels` is of order one.
# Where a mesh takes a quarter of a minute to compile, the default run keeps the one that XLA got wrong (docs/design.md).
MOST_IS_SLOW = [pytest.param(shape, id=str(shape), marks=[pytest.mark.slow] if shape != (2, 2, 2) else []) for shape in MESHES]


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-12), (False, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_leaf_on_every_mesh(shape, x64, tolerance):
    grads, loss, terms = gradient(shape, x64)
    reference = gradient(ONE, x64)
    errors = tiny.relative_errors(grads, reference[0])
    assert len(errors) == 21
    assert all(np.linalg.norm(leaf) > 1e-3 for leaf in jax.tree.leaves(reference[0])), "a gradient that is zero tests nothing"
    assert max(errors.values()) < tolerance, {name: error for name, error in errors.items() if error >= tolerance}
    np.testing.assert_allclose(loss, reference[1], rtol=tolerance)
    assert max(tiny.relative_errors(terms, reference[2]).values()) < tolerance
    np.testing.assert_allclose(terms["loss"], reference[2]["loss"], rtol=tolerance)


# Depth 5 is one period of four scan orders and a block that is left over.
@pytest.mark.parametrize("shape", MOST_IS_SLOW)
def test_every_leaf_of_dig_on_every_mesh(shape):
    dig = {"model__name": "DiG-tiny/2", "model__depth": 5}
    errors = tiny.relative_errors(gradient(shape, True, **dig)[0], gradient(ONE, True, **dig)[0])
    assert len(errors) == 5 * 15 + 11
    assert max(errors.values()) < 1e-12, {name: error for name, error in errors.items() if error >= 1e-12}


TEXT = {
    "DiT": {},
    "DiT, pooled, adaLN-single": {"model__text": "pooled", "model__adaln": "single"},
    "DiG": {"model__name": "DiG-tiny/2", "model__directions": 1},
}


@pytest.mark.parametrize("shape", MOST_IS_SLOW)
@pytest.mark.parametrize("changes", TEXT.values(), ids=TEXT)
def test_every_leaf_with_text(shape, changes):
    grads, _, _ = gradient(shape, True, text=True, **changes)
    reference = gradient(ONE, True, text=True, **changes)[0]
    errors = tiny.relative_errors(grads, reference)
    assert all(np.linalg.norm(leaf) > 1e-8 for leaf in jax.tree.leaves(reference)), "a gradient that is zero tests nothing"
    assert max(errors.values()) < 1e-10, {name: error for name, error in errors.items() if error >= 1e-10}


@pytest.mark.parametrize("shape", MOST_IS_SLOW)
def test_every_leaf_with_text_in_float32(shape):
    errors = tiny.relative_errors(gradient(shape, False, text=True)[0], gradient(ONE, False, text=True)[0])
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def test_accumulation_with_text_changes_only_the_rounding():
    # Lengths and tokens are dealt out together with the images.
    errors = tiny.relative_errors(gradient((2, 2, 2), True, 4, text=True)[0], gradient(ONE, True, text=True)[0])
    assert max(errors.values()) < 1e-12, errors


# As configs/pixels.py.
PIXELS = {
    "diffusion__path": "linear",
    "diffusion__prediction": "x0",
    "diffusion__noise_scale": 2.0,
    "diffusion__variance": "fixed_small",
    "model__qk_norm": True,
    "model__rope": True,
    "model__mlp": "swiglu",
    "model__norm": "rms",
    "model__patch_bottleneck": 4,
}


@pytest.mark.parametrize("shape", MOST_IS_SLOW)
def test_every_leaf_of_a_flow_on_pixels_on_every_mesh(shape):
    grads, reference = gradient(shape, True, **PIXELS)[0], gradient(ONE, True, **PIXELS)[0]
    errors = tiny.relative_errors(grads, reference)
    assert len(errors) == 21 + 6
    # Those of the weights of q_norm and k_norm are 1e-5: random weights of 0.1 make logits of nearly zero.
    assert all(np.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(reference)), "a gradient that is zero tests nothing"
    assert max(errors.values()) < 1e-11, {name: error for name, error in errors.items() if error >= 1e-11}


ROUTE = {"tokens__method": "route", "tokens__start": 1, "tokens__tail": 1, "model__depth": 4}


# Of the middle blocks nothing but the tokens that they see; the gathers' transposes are gathers (models/routing.py). With
# SPRINT, which does all that a route does, the fusion, and some images without their middle blocks.
@pytest.mark.parametrize("method", [pytest.param("route", marks=pytest.mark.slow), "sprint"])
@pytest.mark.parametrize("shape", MOST_IS_SLOW)
def test_every_leaf_with_a_route_on_every_mesh(shape, method):
    changes = ROUTE | {"tokens__method": method}
    grads, loss, terms = gradient(shape, True, 4 if shape == (2, 2, 2) else 1, **changes)  # 8 devices of (8, 1, 1) take 16 rows
    reference = gradient(ONE, True, **changes)
    errors = tiny.relative_errors(grads, reference[0])
    assert len(errors) == 21 + (3 if method == "sprint" else 0)
    assert max(errors.values()) < 1e-12, {name: error for name, error in errors.items() if error >= 1e-12}
    np.testing.assert_allclose(loss, reference[1], rtol=1e-12)
    np.testing.assert_allclose(terms["loss"], reference[2]["loss"], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["route", "sprint"])
def test_every_leaf_of_dig_with_a_route(method):
    """Whatever tokens it keeps: the scans take them as a grid of 4 x 2."""
    dig = {"model__name": "DiG-tiny/2", "model__directions": 2, "tokens__pattern": "cells", "tokens__method": method}
    dig = ROUTE | dig
    errors = tiny.relative_errors(gradient((2, 2, 2), True, 4, **dig)[0], gradient(ONE, True, **dig)[0])
    assert max(errors.values()) < 1e-12, {name: error for name, error in errors.items() if error >= 1e-12}


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_changes_only_the_rounding(accumulation):
    # (2, 2, 2) divides a batch by 4, so that 4 microbatches of 4 leave one example to a device.
    grads, loss, terms = gradient((2, 2, 2), True, accumulation)
    whole = gradient((2, 2, 2), True)
    assert max(tiny.relative_errors(grads, whole[0]).values()) < 1e-12
    np.testing.assert_allclose(loss, whole[1], rtol=1e-12)
    assert max(tiny.relative_errors(terms, whole[2]).values()) < 1e-12
    # The examples' losses differ by far more than this, so equality shows that they are in the batch's order.
    assert np.ptp(whole[2]["loss"]) > 0.1
    np.testing.assert_allclose(terms["loss"], whole[2]["loss"], rtol=1e-12)


@functools.cache
def twenty_adam_steps(shape):
    """The parameters' change and the losses over 20 steps of the real train step, in float64."""
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(shape, optim__learning_rate=1e-3, training__num_steps=20)
        before = tiny.random_like(trainer.shapes.params, dtype=np.float64)
        state = trainer.state(before)
        step = trainer.train_step()
        batch, key = tiny.random_batch(dtype=np.float64), jax.random.key(0)
        losses = []
        for _ in range(20):
            state, metrics = step(state, batch, key)
            losses.append(float(metrics["loss"]))
        return jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before), np.array(losses)


# The changes are compared, not the parameters, whose unchanged part would hide errors. Adam makes a full step of any
# gradient, however small, that is above eps: in float32 the biases of the keys, whose gradient is exactly zero (softmax
# does not see them), would walk about on its rounding. In float64 that rounding, 1e-17, is far below eps = 1e-8, so every
# leaf can be held to the promise.
@pytest.mark.parametrize("shape", MOST_IS_SLOW)
def test_twenty_adam_steps(shape):
    change, losses = twenty_adam_steps(shape)
    reference, reference_losses = twenty_adam_steps(ONE)
    assert reference_losses[-1] < reference_losses[0]
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-12)
    errors = tiny.relative_errors(change, reference)
    assert max(errors.values()) < 1e-9, {name: error for name, error in errors.items() if error >= 1e-9}


def _mlp_errors(up, down):
    """(relative error of the loss, {"up", "down": of the gradient}) on (2, 2, 2) against one device, in float64."""
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(32, 128)) / 32**0.5, "down": rng.normal(size=(128, 32)) / 128**0.5}
    x, y = rng.normal(size=(2, 8, 16, 32))

    def loss(params, x, y):
        return ((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2).mean()

    def run(shape):
        mesh = tiny.make_mesh(shape)
        shardings = {"up": NamedSharding(mesh, up), "down": NamedSharding(mesh, down)}
        rows = sharding.batch_sharding(mesh)
        function = jax.jit(jax.value_and_grad(loss), in_shardings=(shardings, rows, rows), out_shardings=(None, shardings))
        with jax.set_mesh(mesh):
            args = jax.device_put((params, x, y), (shardings, rows, rows))
            return jax.tree.map(np.asarray, function(*args))

    with jax.enable_x64(True):
        (value, grads), (reference, reference_grads) = run((2, 2, 2)), run(ONE)
    return abs(value - reference) / reference, tiny.relative_errors(grads, reference_grads)


def test_layout_of_two_kernels(record_property):
    """XLA:CPU gets the gradient of `up` wrong where both kernels are sharded alike; ours are not."""
    loss_error, errors = _mlp_errors(P("fsdp", "tensor"), P("tensor", "fsdp"))
    assert loss_error < 1e-12 and max(errors.values()) < 1e-12
    # Measured, not asserted: the day XLA gets this right, nothing here need change. 0.78 on jax 0.10.2 and 0.12.0.1.
    loss_error, errors = _mlp_errors(P("fsdp", "tensor"), P("fsdp", "tensor"))
    record_property("alike_loss_error", float(loss_error))
    record_property("alike_up_gradient_error", float(errors["up"]))
    record_property("alike_down_gradient_error", float(errors["down"]))


def test_kernels_are_column_parallel_in_and_row_parallel_out():
    trainer = tiny.make_trainer(texts=TEXTS)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec(names)
        for path, names in jax.tree_util.tree_leaves_with_path(trainer.model.axes, is_leaf=lambda x: isinstance(x, tuple))
    }
    over_tensor = {name: spec for name, spec in specs.items() if name.endswith("kernel") and "tensor" in spec}
    assert over_tensor == {
        "blocks/attention/qkv/kernel": P(None, "fsdp", None, "tensor", None),
        "blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        "blocks/cross/q/kernel": P(None, "fsdp", "tensor", None),
        "blocks/cross/kv/kernel": P(None, "fsdp", None, "tensor", None),
        "blocks/cross/out/kernel": P(None, "tensor", None, "fsdp"),
        "text/hidden/kernel": P("fsdp", "tensor"),
        "text/out/kernel": P("tensor", "fsdp"),
        "blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
    }
