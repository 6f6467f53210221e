"""The step with a second pass in which tokens are masked (tokens.method=mask). data.mask's: test_masked_step.py."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.errors import UserError
from speedit_jax.models.routing import Route
from speedit_jax.reporting import console
from speedit_jax.sampling.sparse_guidance import check_sparse
from speedit_jax.training.checkpoint import Checkpoints, arrays
from speedit_jax.training.inputs import make_draw
from speedit_jax.training.step import make_gradient, make_loss

MASK = {"tokens__method": "mask", "tokens__rate": 0.3, "tokens__tail": 1, "model__depth": 3}
FLOW = {"diffusion__path": "linear", "timesteps__strategy": "uniform"}
ALIGN = {"regularizer__align": 0.5, "regularizer__align_depth": 1, "regularizer__align_teacher_depth": 2}
DISPERSIVE = {"regularizer__dispersive": 0.5, "regularizer__dispersive_depth": 1, "regularizer__dispersive_group": 4}


def flat(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def make_batch(kept=12):
    rng = np.random.default_rng(0)
    batch = {"x0": rng.standard_normal((tiny.BATCH, *tiny.IMAGE))}
    batch |= {name: rng.uniform(0.1, 0.9, tiny.BATCH) for name in ("weight", "importance")}
    batch["t"] = rng.integers(1, 1000, tiny.BATCH).astype(np.int32)
    order = rng.permuted(np.tile(np.arange(16, dtype=np.int32), (tiny.BATCH, 1)), axis=1)
    passes = [
        {
            "noise": rng.standard_normal((tiny.BATCH, *tiny.IMAGE)),
            "y": rng.integers(0, tiny.CLASSES, tiny.BATCH).astype(np.int32),
        }
        for _ in range(2)
    ]
    route = {"order": order, "inverse": np.argsort(order, axis=1).astype(np.int32)}
    return batch | passes[0] | {"masked": passes[1] | route}


def gradient(shape, accumulation, batch=None, **changes):
    """((gradient, loss, terms), trainer, parameters, batch) in float64."""
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(shape, **MASK | changes)
        shapes, shardings = (of.params | of.heads for of in (trainer.shapes, trainer.shardings))
        params = jax.device_put(tiny.random_like(shapes, dtype=np.float64), shardings)
        batch = batch or make_batch()
        loss = make_loss(trainer.model, trainer.diffusion, interpolater=trainer.model.interpolater)
        with jax.set_mesh(trainer.mesh):
            found = jax.jit(make_gradient(loss, accumulation))(params, jax.device_put(batch, trainer.rows))
        return jax.tree.map(np.asarray, found), trainer, params, batch


@pytest.fixture(scope="module")
def reference():
    return gradient(tiny.ONE, 1)


def test_the_mean_of_two_passes(reference):
    """Written out: each with its own noise and labels, both with the same times and weights; the terms are the first's."""
    (_, value, terms), trainer, params, batch = reference
    model, diffusion = trainer.model, trainer.diffusion

    def of_pass(params, batch, **options):
        x_t = diffusion.q_sample(batch["x0"], batch["t"], batch["noise"])
        output = model.apply(params, x_t, batch["t"], batch["y"], **options)
        found = diffusion.losses(output, batch["x0"], x_t, batch["t"], batch["noise"])
        return found, batch["weight"] * found["mse"] + found["vb"]

    with jax.enable_x64(True):
        second = batch | batch["masked"]
        route = Route(second["order"], second["inverse"], 12)
        fill = functools.partial(model.interpolater.apply, params["mask"])
        plain, loss = jax.jit(of_pass)(params, batch)
        masked, masked_loss = jax.jit(lambda p, b: of_pass(p, b, route=route, fill=fill))(params, second)
    total = np.asarray(loss) + np.asarray(masked_loss)
    np.testing.assert_allclose(value, (batch["importance"] * total).mean() / 2, rtol=1e-12)
    for name, expected in (plain | {"loss": loss, "masked_mse": masked["mse"]}).items():
        np.testing.assert_allclose(terms[name], expected, rtol=1e-11, err_msg=name)
    assert sorted(terms) == ["loss", "masked_mse", "mse", "vb"]


def test_two_equal_passes_are_one():
    """Nothing is masked, and noise and labels are the first pass's: the plain loss, not twice it."""
    batch = make_batch()
    batch["masked"] |= {name: batch[name] for name in ("noise", "y")}
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(**MASK)
        params = tiny.random_like(trainer.shapes.params | trainer.shapes.heads, dtype=np.float64)
        model = dataclasses.replace(trainer.model, kept=16)
        losses = [make_loss(model, trainer.diffusion, interpolater=of) for of in (None, model.interpolater)]
        (once, terms), (both, of_both) = (jax.jit(loss)(params, batch) for loss in losses)
    np.testing.assert_allclose(both, once, rtol=1e-12)
    np.testing.assert_allclose(of_both["masked_mse"], terms["mse"], rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "accumulation", "remat"),
    [((2, 2, 2), 2, "lean"), *(pytest.param(mesh, 1, "full", marks=pytest.mark.slow) for mesh in tiny.MESHES)],
    ids=str,
)
def test_meshes_microbatches_and_remat_change_only_the_rounding(reference, shape, accumulation, remat):
    (grads, loss, terms), *_ = gradient(shape, accumulation, model__remat=remat)
    expected = reference[0]
    assert all(np.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(expected[0])), "a gradient that is zero tests nothing"
    assert max(tiny.relative_errors(grads, expected[0]).values()) < 1e-12
    np.testing.assert_allclose(loss, expected[1], rtol=1e-12)
    for name in terms:
        np.testing.assert_allclose(terms[name], expected[2][name], rtol=1e-12, err_msg=name)


def test_what_the_passes_share():
    """Times and weights; noise, dropped labels and the target of another example are each pass's own."""
    changes = MASK | FLOW | {"model__label_dropout": 0.5, "regularizer__contrastive": 0.05}
    trainer = tiny.make_trainer(**changes)
    draw = make_draw(trainer.model, trainer.diffusion, trainer.strategy, trainer.config, None, None)
    state, batch = trainer.state(tiny.random_like(trainer.shapes.params)), tiny.random_batch()
    _, inputs = jax.jit(draw)(state, batch, jax.random.key(1))
    second = inputs.pop("masked")
    assert sorted(second) == ["inverse", "negative", "noise", "order", "y"] and "order" not in inputs
    for name in ("noise", "negative"):
        assert np.abs(np.asarray(second[name] - inputs[name])).min() > 0
    dropped = [np.asarray(of["y"]) == tiny.CLASSES for of in (inputs, second)]
    assert (dropped[0] != dropped[1]).any()
    for is_dropped, of in zip(dropped, (inputs, second), strict=True):
        assert 0 < is_dropped.sum() < tiny.BATCH
        np.testing.assert_array_equal(np.asarray(of["y"])[~is_dropped], batch["label"][~is_dropped])
    # On the linear path the target is the image less the noise, so the other example's can be found by that.
    targets = [batch["image"] - np.asarray(of["noise"]) for of in (inputs, second)]
    others = [
        [int(np.abs(target - row).sum(axis=(1, 2, 3)).argmin()) for row in np.asarray(of["negative"])]
        for target, of in zip(targets, (inputs, second), strict=True)
    ]
    assert others[0] == others[1] and all(other != row for row, other in enumerate(others[0]))


@pytest.mark.slow
def test_strategies_and_quarters_see_the_unmasked_pass():
    """At the same weights the terms of a step, and what the strategy learns, are the plain step's."""
    changes = {"model__depth": 3, "timesteps__strategy": "loss_second_moment"}
    plain, masked = tiny.make_trainer(**changes), tiny.make_trainer(**MASK | changes)
    params, batch, key = tiny.random_like(plain.shapes.params), tiny.random_batch(), jax.random.key(3)
    (after, metrics), (found, others) = (of.train_step()(of.state(params), batch, key) for of in (plain, masked))
    for name in ("mse", "vb", *(f"{term}_q{i}" for term in ("mse", "loss") for i in (1, 2, 3, 4))):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(found.timesteps), jax.tree.leaves(after.timesteps), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert others["masked_mse"] != others["mse"] and others["loss"] != metrics["loss"]


def learned(before, after):
    """The names of the arrays of `heads` that differ."""
    old, new = flat(before.heads), flat(after.heads)
    return {name for name in new if (np.asarray(new[name]) != np.asarray(old[name])).any()}


def test_the_state():
    """The side-interpolater is no part of the network or its average; a step keeps the state's form."""
    plain, trainer = tiny.make_trainer(model__depth=3), tiny.make_trainer(**MASK)
    assert flat(trainer.shapes.ema).keys() == flat(trainer.shapes.params).keys() == flat(plain.shapes.params).keys()
    assert sorted(trainer.shapes.heads) == ["mask"] and sorted(trainer.shapes.heads["mask"]) == ["side", "token"]
    after, metrics = trainer.lower_step().out_info
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(lambda s: (s.shape, s.dtype), trainer.shapes)
    assert "masked_mse" in metrics


@pytest.mark.slow
def test_a_step():
    """The same again to the bit, and all of the side-interpolater learns."""
    trainer = tiny.make_trainer(**MASK)
    state, step, key = trainer.state(tiny.random_like(trainer.shapes.params)), trainer.train_step(), jax.random.key(0)
    (after, metrics), again = (step(state, tiny.random_batch(), key) for _ in range(2))
    tiny.assert_same((after, metrics), again)
    assert np.isfinite(metrics["grad_norm"]) and metrics["masked_mse"] > 0
    changed = learned(state, after)
    assert {"mask/token", "mask/side/mlp/up/kernel"} <= changed == flat(state.heads).keys()


@pytest.mark.slow
def test_beside_other_methods_and_resumed(tmp_path):
    """With alignment, the dispersive loss, data.mask and microbatches.

    Resumed from a checkpoint, the next step is the same to the bit; its weights fit a plain network, which begins as this one.
    """
    plain = tiny.make_trainer(model__depth=3, data__mask="mixed")
    trainer = tiny.make_trainer(**MASK | ALIGN | DISPERSIVE, data__mask="mixed", training__accumulation=2)
    first = [of.initial_state(jax.random.key(0)) for of in (plain, trainer)]
    tiny.assert_same(*(of.params for of in first))
    assert sorted(first[1].heads) == ["align", "mask"]
    state, step, key = trainer.state(tiny.random_like(trainer.shapes.params)), trainer.train_step(), jax.random.key(0)
    after, metrics = step(state, tiny.random_batch(), key)
    assert np.isfinite(metrics["grad_norm"]) and {"masked_mse", "align", "dispersive"} <= metrics.keys()
    assert learned(state, after) == flat(state.heads).keys()
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save(1, after, {})
    checkpoints.wait()
    restored = checkpoints.restore(1, trainer.shapes, trainer.shardings)
    tiny.assert_same(arrays(restored), arrays(after))
    tiny.assert_same(*(step(of, tiny.random_batch(1), key) for of in (restored, after)))
    tiny.assert_same(checkpoints.restore_weights(1, "ema", plain.shapes.params, plain.shardings.params), after.ema)
    with pytest.raises(UserError, match="does not fit the model: extra heads/"):
        checkpoints.restore(1, plain.shapes, plain.shardings)
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["cross", "pooled"])
def test_text(text):
    """Both passes are told it, and its layers of the side block learn."""
    trainer = tiny.make_trainer(texts=tiny.TEXTS, model__text=text, training__accumulation=2, **MASK)
    rng = np.random.default_rng(0)
    rows = trainer.model.conditions(tiny.BATCH)
    batch = tiny.random_batch() | {
        "text": {
            "tokens": rng.standard_normal(rows["tokens"].shape).astype(rows["tokens"].dtype),
            "length": rng.integers(1, 9, rows["length"].shape).astype(np.int32),
        }
    }
    state = trainer.state(tiny.random_like(trainer.shapes.params))
    after, metrics = trainer.train_step()(state, batch, jax.random.key(0))
    assert np.isfinite(metrics["grad_norm"])
    assert learned(state, after) == flat(state.heads).keys()
    assert any("cross" in name for name in learned(state, after)) == (text == "cross")


def test_what_is_said():
    trainer = tiny.make_trainer(**MASK)
    assert "a second pass, in which blocks 0 to 1 see 12 of 16 tokens" in console.route_line(trainer.model)
    with pytest.raises(UserError, match=r"sparse_weak=0\.75.*trained with tokens\.method=route"):
        check_sparse(0.5, 0.75, trainer.model, guided=False)
