"""Losses added to the objective, in the step."""

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.errors import UserError
from speedit_jax.training.step import make_gradient, make_loss

DISPERSIVE = {"regularizer__dispersive": 0.5, "regularizer__dispersive_depth": 1, "regularizer__dispersive_group": 4}
CONTRASTIVE = {"regularizer__contrastive": 0.05, "diffusion__path": "linear"}


def gradient(shape, accumulation, **changes):
    """(gradient, loss, terms) in float64 of the loss with what `changes` switch on."""
    rng = np.random.default_rng(0)
    images = {name: rng.standard_normal((tiny.BATCH, *tiny.IMAGE)) for name in ("x0", "noise", "negative")}
    numbers = {name: rng.uniform(0.1, 0.9, tiny.BATCH) for name in ("t", "weight", "importance")}
    batch = images | numbers | {"y": rng.integers(0, tiny.CLASSES, tiny.BATCH).astype(np.int32)}
    with jax.enable_x64(True):
        trainer = tiny.make_trainer(shape, **{"diffusion__path": "linear"} | changes)
        params = jax.device_put(tiny.random_like(trainer.shapes.params, dtype=np.float64), trainer.shardings.params)
        loss = make_loss(trainer.model, trainer.diffusion, trainer.config.regularizer)
        with jax.set_mesh(trainer.mesh):
            function = jax.jit(make_gradient(loss, accumulation))
            return jax.tree.map(np.asarray, function(params, jax.device_put(batch, trainer.rows)))


@pytest.mark.parametrize("changes", [DISPERSIVE, CONTRASTIVE], ids=["dispersive", "contrastive"])
def test_meshes_and_microbatches_change_only_the_rounding(changes):
    grads, loss, terms = gradient((2, 2, 2), 2, **changes)
    reference = gradient(tiny.ONE, 1, **changes)
    assert max(tiny.relative_errors(grads, reference[0]).values()) < 1e-12
    np.testing.assert_allclose(loss, reference[1], rtol=1e-12)
    assert terms.keys() == reference[2].keys() and len(terms) == 3
    for name, values in terms.items():
        np.testing.assert_allclose(values, reference[2][name], rtol=1e-12)


def test_what_is_minimised():
    """The objective that strategies learn from stays; the scalar gets the added terms."""
    _, plain, terms = gradient(tiny.ONE, 1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        rng.standard_normal((tiny.BATCH, *tiny.IMAGE))
    _, weight, importance = (rng.uniform(0.1, 0.9, tiny.BATCH) for _ in range(3))
    _, value, found = gradient(tiny.ONE, 1, **DISPERSIVE)
    np.testing.assert_allclose(found["loss"], terms["loss"], rtol=1e-12)
    np.testing.assert_allclose(value, plain + 0.5 * found["dispersive"].mean(), rtol=1e-12)
    assert (-np.log(4) <= found["dispersive"]).all() and (found["dispersive"] < 0).all()
    _, value, found = gradient(tiny.ONE, 1, **CONTRASTIVE)
    np.testing.assert_allclose(found["loss"], terms["loss"], rtol=1e-12)
    np.testing.assert_allclose(value, plain - 0.05 * (importance * weight * found["contrast"]).mean(), rtol=1e-12)


def test_off_is_the_plain_step():
    off = {"regularizer__dispersive_depth": 99, "regularizer__dispersive_group": 3}
    text = [tiny.make_trainer(**of).lower_step().as_text() for of in ({}, off)]
    assert text[0] == text[1]


def test_a_step_with_both():
    trainer = tiny.make_trainer(**DISPERSIVE, **CONTRASTIVE, timesteps__strategy="gradient_noise", timesteps__probe_every=1)
    state = trainer.state(tiny.random_like(trainer.shapes.params))
    _, metrics = trainer.train_step()(state, tiny.random_batch(), jax.random.key(0))
    assert np.isfinite(metrics["grad_norm"]) and {"dispersive", "contrast"} <= metrics.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"regularizer__contrastive": 0.05}, r"contrastive is for flows that predict the velocity: .*set diffusion\.path=linear"),
        (CONTRASTIVE | {"diffusion__prediction": "x0"}, r"contrastive is for flows .*set diffusion\.prediction=epsilon"),
        ({"regularizer__contrastive": 1.0}, r"regularizer\.contrastive=1\.0"),
        (CONTRASTIVE | {"training__batch_size": 1}, r"another example in each batch"),
        ({"regularizer__dispersive": -1.0}, r"regularizer\.dispersive=-1\.0"),
        (DISPERSIVE | {"regularizer__dispersive_depth": 3}, r"dispersive_depth=3.*1\.\.its depth"),
        (DISPERSIVE | {"model__name": "DiG-tiny/2"}, r"must be a DiT"),
        (DISPERSIVE | {"regularizer__dispersive_group": 1}, r"dispersive_group=1"),
        (DISPERSIVE | {"training__accumulation": 8}, r"dispersive_group=4.*batch_size=16.*accumulation=8"),
        (DISPERSIVE | {"regularizer__dispersive_temperature": 0.0}, r"dispersive_temperature=0\.0"),
        (
            DISPERSIVE
            | {"regularizer__dispersive_depth": 2, "model__depth": 4, "tokens__method": "route"}
            | {"tokens__start": 1, "tokens__tail": 1},
            r"dispersive_depth=2: blocks 1 to 2",
        ),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.make_trainer(**changes)
