"""Alignment with stored features in the step: REPA's and iREPA's formulas in PyTorch, and HASTE's stop."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from errors import assert_one_line
from test_self_alignment import ROUTE, flat, gradient, hidden_of_route, make_batch

from speedit_jax.models import align
from speedit_jax.training.step import make_gradient, make_loss

FEATURES = (4, 4, 6)  # of the 4 x 4 tokens
REPA = {"regularizer__align": 0.5, "regularizer__align_target": "features", "regularizer__align_depth": 1}
IREPA = REPA | {"regularizer__align": 1.0, "regularizer__align_head": "conv", "regularizer__align_spatial_norm": 0.6}
ROUTED = REPA | ROUTE | {"regularizer__align_depth": 2}  # inside of the route
FLOW = {"diffusion__path": "linear"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(align, "HIDDEN", 64)


CASES = {
    "mlp, routed": (ROUTED | FLOW, FEATURES),
    "conv, normalised, of a finer grid": (IREPA | FLOW, (8, 4, 6)),
}


@functools.cache
def on_one_device(case):
    changes, shape = CASES[case]
    return gradient(tiny.ONE, 1, shape, **changes)


@pytest.mark.parametrize("case", CASES)
def test_the_published_losses(case):
    """In PyTorch, float64, from the hidden state on."""
    torch = pytest.importorskip("torch")
    from torch.nn.functional import avg_pool2d, conv2d, cosine_similarity, silu

    (grads, value, terms), trainer, params, _, batch = on_one_device(case)
    model, flow, of = trainer.model, trainer.diffusion, trainer.config.regularizer
    routed, convolved = model.kept is not None, of.align_head == "conv"

    def tokens(params):
        x = flow.q_sample(batch["x0"], batch["t"], batch["noise"])
        return model.apply(params, x, batch["t"], batch["y"], taps=(of.align_depth,))[1][0]

    with jax.enable_x64(True):
        hidden_of = (lambda p: hidden_of_route(model, flow, p, batch, of.align_depth)) if routed else tokens
        hidden = torch.tensor(np.asarray(jax.jit(hidden_of)({k: v for k, v in params.items() if k != "align"})))
    target = torch.tensor(batch["features"])
    if convolved:
        pooled = avg_pool2d(target.permute(0, 3, 1, 2), (2, 1)).permute(0, 2, 3, 1).flatten(1, 2)
        target = (pooled - 0.6 * pooled.mean(1, keepdim=True)) / (pooled.std(1, keepdim=True) + 1e-6)
    else:
        target = target.flatten(1, 2)
    if routed:
        ids = torch.tensor(batch["order"][:, : model.kept]).long()
        target = torch.stack([row[chosen] for row, chosen in zip(target, ids, strict=True)])
    head = {name: torch.tensor(np.asarray(leaf), requires_grad=True) for name, leaf in flat(params["align"]).items()}
    if convolved:
        kernel = head["convolution/kernel"].permute(3, 2, 0, 1)
        on_grid = hidden.permute(0, 2, 1).unflatten(2, model.grid)
        z = conv2d(on_grid, kernel, head["convolution/bias"], padding=1).flatten(2).permute(0, 2, 1)
    else:
        z = silu(hidden @ head["hidden/kernel"] + head["hidden/bias"])
        z = silu(z @ head["middle/kernel"] + head["middle/bias"]) @ head["out/kernel"] + head["out/bias"]
    each = 1 - cosine_similarity(z, target, dim=-1).mean(1)
    np.testing.assert_allclose(terms["align"], each.detach(), rtol=1e-11)
    added = of.align * (torch.tensor(batch["importance"]) * each).mean()
    np.testing.assert_allclose(value, (batch["importance"] * terms["loss"]).mean() + added.item(), rtol=1e-12)
    added.backward()
    for name, leaf in flat(grads["align"]).items():
        assert np.abs(leaf).max() > 1e-6, name
        np.testing.assert_allclose(leaf, head[name].grad, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if "conv" in case else []) for case in CASES])
def test_meshes_microbatches_and_remat_change_only_the_rounding(case):
    changes, shape = CASES[case]
    (grads, loss, terms), *_ = gradient((2, 2, 2), 2, shape, **changes | {"model__remat": "lean"})
    reference = on_one_device(case)[0]
    assert all(np.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(reference[0])), "a gradient that is zero tests nothing"
    assert max(tiny.relative_errors(grads, reference[0]).values()) < 1e-12
    np.testing.assert_allclose(loss, reference[1], rtol=1e-12)
    np.testing.assert_allclose(terms["align"], reference[2]["align"], rtol=1e-12)


def test_after_the_stop_the_gradient_is_the_plain_one_to_the_bit():
    keys = REPA | FLOW | {"diffusion__variance": "fixed_small", "regularizer__align_until": 10}
    trainer = tiny.make_trainer(features=FEATURES, **keys)
    params = tiny.random_like(trainer.shapes.params | trainer.shapes.heads)
    batch = make_batch(trainer.model, flow=True, features=FEATURES)
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, batch)

    # The plain loss, but with the depth cut at the tap; and one operation after another. XLA fuses two programs differently.
    def cut(*given):
        return trainer.model.apply(*given, taps=(1,))[0]

    losses = {
        "plain": make_loss(dataclasses.replace(trainer.model, apply=cut), trainer.diffusion),
        "aligned": make_loss(trainer.model, trainer.diffusion, trainer.config.regularizer, trainer.projector),
    }
    found = {name: make_gradient(of, 1) for name, of in losses.items()}
    plain, value, _ = found["plain"](params, batch)
    on, _, _ = found["aligned"](params, batch | {"aligning": np.ones(tiny.BATCH, np.float32)})
    off, stopped, _ = found["aligned"](params, batch | {"aligning": np.zeros(tiny.BATCH, np.float32)})
    assert value == stopped
    assert not any(leaf.any() for leaf in jax.tree.leaves(off["align"]))
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(on["align"]))
    for (name, leaf), ours in zip(flat(plain).items(), flat(off).values(), strict=True):
        np.testing.assert_array_equal(ours, leaf, err_msg=name)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return tiny.random_batch(seed) | {"features": rng.standard_normal((tiny.BATCH, *FEATURES)).astype(np.float16)}


def test_the_steps_around_the_stop():
    """The head learns until then, and the loss is the mse alone from then on."""
    keys = REPA | {"regularizer__align_until": 1, "timesteps__strategy": "uniform", "diffusion__variance": "fixed_small"}
    trainer = tiny.make_trainer(features=FEATURES, **keys)
    before = trainer.initial_state(jax.random.key(0))
    parts = [f"align/{name}/{parameter}" for name in ("hidden", "middle", "out") for parameter in ("bias", "kernel")]
    assert sorted(flat(before.heads)) == parts and flat(before.ema).keys() == flat(before.params).keys()
    step = trainer.train_step()
    after, metrics = step(before, batch_of(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], metrics["mse"] + 0.5 * metrics["align"], rtol=1e-5)
    changed = [np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (after.heads, before.heads)), strict=True)]
    assert all(changed) and 0 < metrics["align"] < 2
    _, metrics = step(after, batch_of(1), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], metrics["mse"], rtol=1e-6)


def test_a_token_without_neighbours_meets_the_centre_of_the_convolution():
    one = tiny.make_trainer(features=(1, 1, 6), **REPA, regularizer__align_head="conv", model__name="DiT-tiny/8")
    params = tiny.random_like(one.shapes.heads["align"])
    hidden = np.random.default_rng(0).standard_normal((3, 1, 32)).astype(np.float32)
    of = params["convolution"]
    np.testing.assert_allclose(one.projector.apply(params, hidden), hidden @ of["kernel"][1, 1] + of["bias"], atol=1e-6)


@pytest.mark.parametrize("head", align.HEADS)
def test_flops_of_the_head_are_xlas(monkeypatch, head):
    monkeypatch.setattr(align, "HIDDEN", 512)
    trainer = tiny.make_trainer(features=FEATURES, **REPA, regularizer__align_head=head)
    hidden = jax.ShapeDtypeStruct((1, 16, 32), np.float32)
    counted = jax.jit(trainer.projector.apply).lower(trainer.shapes.heads["align"], hidden).compile().cost_analysis()["flops"]
    # XLA counts biases and SiLU too, and of a convolution not the products with the zeros around the grid: 100 of 144 are left.
    share = 100 / 144 if head == "conv" else 1
    assert counted == pytest.approx(share * 16 * trainer.projector.forward_flops, rel=0.03)


MISTAKES = {
    "no features": (REPA, None, ["align_target=features wants data.features"]),
    "features of nobody": ({}, FEATURES, ["data.features is set, but nothing uses it"]),
    "features of another target": (REPA | {"regularizer__align_target": "ema"}, FEATURES, ["align_target=ema does not use it"]),
    "another target": (REPA | {"regularizer__align_target": "dino"}, FEATURES, ["'dino'", "ema, features"]),
    "another head": (REPA | {"regularizer__align_head": "linear"}, FEATURES, ["'linear'", "mlp, conv"]),
    "a coarser grid": (REPA, (2, 2, 6), ["grid of 2x2", "4x4 tokens", "--grid=4,4"]),
    "no multiple": (REPA, (6, 4, 6), ["grid of 6x4"]),
    "too deep": (REPA | {"regularizer__align_depth": 3}, FEATURES, ["align_depth=3"]),
    "DiG": (REPA | {"model__name": "DiG-tiny/2"}, FEATURES, ["must be a DiT"]),
    "a convolution of a part": (ROUTED | {"regularizer__align_head": "conv"}, FEATURES, ["align_head=conv", "blocks 1 to 2"]),
    "a negative stop": (REPA | {"regularizer__align_until": -1}, FEATURES, ["align_until=-1"]),
    "a negative norm": (REPA | {"regularizer__align_spatial_norm": -0.1}, FEATURES, ["align_spatial_norm=-0.1"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_impossible_settings(case):
    changes, features, words = MISTAKES[case]
    assert_one_line(lambda: tiny.make_trainer(features=features, **changes), *words)
