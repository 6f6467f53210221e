"""Drawing by text: guidance, its interval and autoguidance, on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.models.condition import padded
from speedit_jax.sampling.sampler import Settings, make_sampler
from speedit_jax.training.inputs import drop_conditions

KEY, INDICES = jax.random.key(3), np.arange(8)
SETTINGS = Settings("ddim", 4, 0.0, 2.0, 0, True)
RNG = np.random.default_rng(0)
Y = {"tokens": RNG.normal(size=(8, 8, 16)).astype(np.float16), "length": RNG.integers(1, 9, 8).astype(np.int32)}
NULL = padded(*tiny.TEXTS.null, tiny.make_trainer(texts=tiny.TEXTS).model.text)
NULL_ROWS = {name: np.broadcast_to(value, Y[name].shape) for name, value in NULL.items()}


@functools.cache
def trainer(shape=tiny.ONE):
    return tiny.make_trainer(shape, texts=tiny.TEXTS)


@functools.cache
def weights(seed=0, shape=tiny.ONE):
    of = trainer(shape)
    return jax.device_put(tiny.random_like(of.shapes.params, seed), of.shardings.params)


def draw(y=Y, null=NULL, shape=tiny.ONE, params=None, guide=None, **changes):
    of = trainer(shape)
    sampler = make_sampler(of.model, of.diffusion, dataclasses.replace(SETTINGS, **changes), of.mesh, guide)
    return np.asarray(sampler(weights(shape=shape) if params is None else params, KEY, INDICES, y, null))


# Images lie in [-1, 1]; the doubled batch adds up in another order, and four steps enlarge that.
CLOSE = {"atol": 1e-4}


def test_guidance_leads_from_the_null_text():
    own, other = draw(guidance_scale=1.0), draw(NULL_ROWS, guidance_scale=1.0)
    assert np.abs(own - other).max() > 0.1
    np.testing.assert_allclose(draw(guidance_scale=0.0), other, **CLOSE)
    assert np.abs(draw() - own).max() > 0.01
    # Without guidance nobody looks at it.
    np.testing.assert_array_equal(draw(guidance_scale=1.0, null={**NULL, "tokens": -NULL["tokens"]}), own)


def test_guidance_in_an_interval():
    inside = draw(guidance_low=0.3, guidance_high=0.6)
    assert np.abs(inside - draw()).max() > 1e-3 and np.abs(inside - draw(guidance_scale=1.0)).max() > 1e-3
    np.testing.assert_allclose(draw(guidance_low=0.0, guidance_high=1.0), draw(), **CLOSE)


def test_a_weaker_network_is_given_the_same_text():
    pair = (weights(), weights(1))
    drawn = draw(params=pair, guide=trainer().model, guidance_scale=0.0)
    np.testing.assert_allclose(drawn, draw(params=weights(1), guidance_scale=1.0), **CLOSE)


def test_on_a_mesh():
    np.testing.assert_allclose(draw(shape=(2, 2, 2)), draw(), **CLOSE)


def test_dropped_captions_become_the_null_text():
    key = jax.random.key(0)
    dropped = np.asarray(jax.random.bernoulli(key, 0.5, (8,)))
    assert 0 < dropped.sum() < 8
    out = drop_conditions(key, Y, 0.5, NULL)
    for name in Y:
        np.testing.assert_array_equal(np.asarray(out[name])[dropped], NULL_ROWS[name][dropped])
        np.testing.assert_array_equal(np.asarray(out[name])[~dropped], Y[name][~dropped])


def test_a_step_does_not_see_dropped_captions():
    """All of them are dropped, so that no two texts differ; without dropping they do."""
    losses = {}
    batch = {"image": np.zeros((tiny.BATCH, *tiny.IMAGE), np.float32), "label": np.zeros(tiny.BATCH, np.int32)}
    for rate in (0.0, 0.99999):
        of = tiny.make_trainer(texts=tiny.TEXTS, model__label_dropout=rate)
        run, state = of.train_step(), of.state(tiny.random_like(of.shapes.params))
        texts = [{name: np.repeat(value[:1], tiny.BATCH, 0) for name, value in Y.items()} for _ in range(2)]
        texts[1]["tokens"] = -texts[0]["tokens"]
        losses[rate] = [float(run(state, batch | {"text": text}, KEY)[1]["loss"]) for text in texts]
    assert losses[0.0][0] != losses[0.0][1]
    assert losses[0.99999][0] == losses[0.99999][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps__strategy": "loss_second_moment"},
        {"timesteps__strategy": "gradient_noise", "training__batch_size": 64},
        {"diffusion__path": "linear", "timesteps__strategy": "logit_normal"},
        {"training__accumulation": 2, "model__remat": "full", "model__name": "DiG-tiny/2"},
    ],
    ids=str,
)
def test_strategies_flows_and_accumulation_take_text(changes):
    """The step is traced, not run."""
    of = tiny.make_trainer(texts=tiny.TEXTS, **changes)
    with jax.set_mesh(of.mesh):
        state, metrics = jax.eval_shape(of.jit_step(), of.shapes, of.batch_shapes(), KEY)
    assert metrics["loss"].shape == () and jax.tree.map(lambda s: s.shape, state) == jax.tree.map(lambda s: s.shape, of.shapes)
