"""Self-representation alignment in the step: the published formulas in PyTorch, and where the head's parameters are."""

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.errors import UserError
from speedit_jax.models.align import Projector
from speedit_jax.models.routing import Route
from speedit_jax.training.checkpoint import Checkpoints, arrays
from speedit_jax.training.step import make_gradient, make_loss

ALIGN = {"regularizer__align": 0.5, "regularizer__align_depth": 1, "regularizer__align_teacher_depth": 2}
ROUTE = {"tokens__method": "route", "tokens__start": 1, "tokens__tail": 1, "model__depth": 4}
# The student's tap lies inside of the route.
ROUTED = ALIGN | ROUTE | {"regularizer__align_depth": 2, "regularizer__align_teacher_depth": 3}


def make_batch(model, flow=False, features=None):
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((tiny.BATCH, *tiny.IMAGE)) for name in ("x0", "noise")}
    batch |= {name: rng.uniform(0.1, 0.9, tiny.BATCH) for name in ("weight", "importance")}
    batch["y"] = rng.integers(0, tiny.CLASSES, tiny.BATCH).astype(np.int32)
    t, gap = rng.uniform(0.1, 0.9, tiny.BATCH), rng.uniform(0, 0.1, tiny.BATCH)
    times = {"t": t, "teacher_t": t + gap}
    batch |= times if flow else {name: (1000 * (1 - t)).astype(np.int32) for name, t in times.items()}
    if features:
        batch["features"] = rng.standard_normal((tiny.BATCH, *features))
    if model.kept is not None:
        order = rng.permuted(np.tile(np.arange(16, dtype=np.int32), (tiny.BATCH, 1)), axis=1)
        batch |= {"order": order, "inverse": np.argsort(order, axis=1).astype(np.int32)}
    return batch


def gradient(shape, accumulation, features=None, **changes):
    """((gradient, loss, terms), trainer, parameters, teacher, batch) in float64."""
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(shape, features=features, **changes)
        shapes, shardings = (of.params | of.heads for of in (trainer.shapes, trainer.shardings))
        params = jax.device_put(tiny.random_like(shapes, dtype=np.float64), shardings)
        teacher = jax.device_put(tiny.random_like(trainer.shapes.params, 1, np.float64), trainer.shardings.params)
        batch = make_batch(trainer.model, "diffusion__path" in changes, features)
        loss = make_loss(trainer.model, trainer.diffusion, trainer.config.regularizer, trainer.projector)
        with jax.set_mesh(trainer.mesh):
            found = jax.jit(make_gradient(loss, accumulation))(params, jax.device_put(batch, trainer.rows), teacher)
        return jax.tree.map(np.asarray, found), trainer, params, teacher, batch


@pytest.mark.parametrize("kind, routed", [("cosine", False), ("smooth_l1", True)])
def test_the_published_loss(kind, routed):
    """In PyTorch from the two hidden states on: linear, SiLU, linear, then the distance. Values, and gradients of the head."""
    torch = pytest.importorskip("torch")
    changes = {"diffusion__path": "linear", "regularizer__align_loss": kind} | (ROUTED if routed else ALIGN)
    (grads, value, terms), trainer, params, teacher, batch = gradient(tiny.ONE, 1, **changes)
    model, flow, of = trainer.model, trainer.diffusion, trainer.config.regularizer

    def tokens(params, t, depth):
        alpha = t.reshape(-1, 1, 1, 1)
        x = alpha * batch["x0"] + (1 - alpha) * batch["noise"]
        with jax.enable_x64(True):
            return np.asarray(jax.jit(lambda p: model.apply(p, x, t, batch["y"], taps=(depth,)))(params)[1][0])

    target = torch.tensor(tokens(teacher, batch["teacher_t"], of.align_teacher_depth))
    if routed:
        ids = batch["order"][:, : model.kept]
        target = torch.stack([row[chosen] for row, chosen in zip(target, torch.tensor(ids).long(), strict=True)])
        with jax.enable_x64(True):
            seen = jax.jit(lambda p: hidden_of_route(model, flow, p, batch, of.align_depth))(params)
        hidden = torch.tensor(np.asarray(seen))
    else:
        hidden = torch.tensor(tokens(params, batch["t"], of.align_depth))
    head = {name: torch.tensor(np.asarray(leaf), requires_grad=True) for name, leaf in flat(params["align"]).items()}
    middle = torch.nn.functional.silu(hidden @ head["hidden/kernel"] + head["hidden/bias"])
    z = middle @ head["out/kernel"] + head["out/bias"]
    if kind == "cosine":
        each = (1 - torch.nn.functional.cosine_similarity(z, target, dim=-1)).mean(1)
    else:
        each = torch.nn.functional.smooth_l1_loss(z, target, beta=0.05, reduction="none").mean((1, 2))
    np.testing.assert_allclose(terms["align"], each.detach(), rtol=1e-11)
    added = 0.5 * (torch.tensor(batch["importance"]) * each).mean()
    np.testing.assert_allclose(value, (batch["importance"] * terms["loss"]).mean() + added.item(), rtol=1e-12)
    added.backward()
    for name, leaf in flat(grads["align"]).items():
        np.testing.assert_allclose(leaf, head[name].grad, atol=1e-12, err_msg=name)


def hidden_of_route(model, flow, params, batch, depth):
    x = flow.q_sample(batch["x0"], batch["t"], batch["noise"])
    route = Route(batch["order"], batch["inverse"], model.kept)
    return model.apply(params, x, batch["t"], batch["y"], route=route, taps=(depth,))[1][0]


def flat(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


@pytest.mark.parametrize("changes", [ROUTED | {"model__remat": "lean"}], ids=["routed, remat"])
def test_meshes_microbatches_and_remat_change_only_the_rounding(changes):
    (grads, loss, terms), *_ = gradient((2, 2, 2), 2, **changes)
    reference, *_ = gradient(tiny.ONE, 1, **ROUTED)
    assert all(np.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(reference[0])), "a gradient that is zero tests nothing"
    assert max(tiny.relative_errors(grads, reference[0]).values()) < 1e-12
    np.testing.assert_allclose(loss, reference[1], rtol=1e-12)
    np.testing.assert_allclose(terms["align"], reference[2]["align"], rtol=1e-12)


def test_a_network_is_aligned_with_itself():
    """The same weights, depth and times, and no head: nothing is left. And the teacher has no gradient, whatever it is."""
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(**ALIGN | {"regularizer__align_teacher_depth": 1})
        itself = Projector(lambda key: {}, lambda params, hidden: hidden, {}, 0)
        loss = make_loss(trainer.model, trainer.diffusion, trainer.config.regularizer, itself)
        params = tiny.random_like(trainer.shapes.params, dtype=np.float64)
        batch = make_batch(trainer.model)
        both = jax.jit(lambda params, teacher, batch: loss(params | {"align": {}}, batch, teacher))
        _, terms = both(params, params, batch | {"teacher_t": batch["t"]})
        np.testing.assert_allclose(terms["align"], 0, atol=1e-12)
        assert (both(params, params, batch)[1]["align"] > 1e-5).all()
        gradient = jax.jit(jax.grad(lambda *given: both(*given)[0], argnums=1))(params, params, batch)
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_off_is_the_plain_step():
    of_none = {"depth": 99, "loss": "no", "time_gap": -1.0, "target": "no", "head": "no", "spatial_norm": -1.0, "until": -1}
    off = {f"regularizer__align_{name}": value for name, value in of_none.items()}
    text = [tiny.make_trainer(**of).lower_step().as_text() for of in ({}, off)]
    assert text[0] == text[1]


def test_the_state_and_a_step(tmp_path):
    """The head is no part of the network or its average; it learns; a checkpoint has it, and one without it is as before.

    Resumed from that checkpoint, with a route, the next step is the same to the bit.
    """
    plain, trainer = tiny.make_trainer(model__depth=4), tiny.make_trainer(**ROUTED, timesteps__strategy="loss_second_moment")
    states = {name: of.initial_state(jax.random.key(0)) for name, of in (("plain", plain), ("aligned", trainer))}
    tiny.assert_same(states["plain"].params, states["aligned"].params)
    state = states["aligned"]
    assert flat(trainer.shapes.ema).keys() == flat(plain.shapes.params).keys()
    assert sorted(flat(state.heads)) == ["align/hidden/bias", "align/hidden/kernel", "align/out/bias", "align/out/kernel"]
    step, key = trainer.train_step(), jax.random.key(0)
    after, metrics = step(state, tiny.random_batch(), key)
    tiny.assert_same((after, metrics), step(state, tiny.random_batch(), key))
    assert 0 < metrics["align"] < 2 and np.isfinite(metrics["grad_norm"])
    changed = {
        name: bool((np.asarray(leaf) != np.asarray(flat(state.heads)[name])).any()) for name, leaf in flat(after.heads).items()
    }
    assert all(changed.values()), changed
    for steps, of, parts in ((1, after, trainer), (2, states["plain"], plain)):
        checkpoints = Checkpoints(tmp_path / str(steps), create=True)
        checkpoints.save(steps, of, {})
        checkpoints.wait()
        restored = checkpoints.restore(steps, parts.shapes, parts.shardings)
        tiny.assert_same(arrays(restored), arrays(of))
        if steps == 1:
            tiny.assert_same(*(step(at, tiny.random_batch(1), key) for at in (restored, after)))
        assert any("heads" in name for name in arrays(restored)) == (steps == 1)
        weights = checkpoints.restore_weights(steps, "ema", plain.shapes.params, plain.shardings.params)
        tiny.assert_same(weights, of.ema)
        with pytest.raises(UserError, match=r"does not fit the model: (extra|missing) heads/align"):
            other = plain if steps == 1 else trainer
            checkpoints.restore(steps, other.shapes, other.shardings)
        checkpoints.close()


@pytest.mark.slow
def test_flops_are_xlas():
    """Of a step, the depth unrolled: what alignment adds to it. XLA counts norms and activations too."""
    sizes = {"model__width": 128, "model__depth": 4, "model__scan_unroll": 4, "data__height": 32, "data__width": 32}
    image = {"model__name": "DiT-tiny/2"}
    counted = {}
    for name, keys in (("plain", {}), ("aligned", ALIGN | {"regularizer__align_teacher_depth": 3})):
        trainer = tiny.make_trainer(**sizes | image | keys)
        counted[name] = trainer.lower_step().compile().cost_analysis()["flops"], trainer.step_flops
    ratios = [counted["aligned"][i] / counted["plain"][i] for i in (0, 1)]
    assert 1.2 < ratios[1] < 1.5
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"regularizer__align": -1.0}, r"regularizer\.align=-1\.0"),
        (ALIGN | {"regularizer__align_teacher_depth": 3}, r"align_depth=1, align_teacher_depth=3.*1\.\.its depth"),
        (ALIGN | {"regularizer__align_depth": 2, "regularizer__align_teacher_depth": 1}, r"the teacher's not before the other"),
        (ALIGN | {"model__name": "DiG-tiny/2"}, r"must be a DiT"),
        (ALIGN | {"regularizer__align_loss": "l2"}, r"align_loss 'l2'.*cosine, smooth_l1"),
        (ALIGN | {"regularizer__align_time_gap": 1.5}, r"align_time_gap=1\.5"),
        (ALIGN | {"regularizer__align_head": "conv"}, r"align_head=conv.*align_target=features"),
        (ALIGN | {"regularizer__align_spatial_norm": 0.6}, r"align_spatial_norm=0\.6.*align_target=features"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.make_trainer(**changes)
