"""Drawing by text: guidance, its interval and autoguidance, on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.models.condition import padded
from speedit_jax.sampling.sampler import Settings, make_sampler
from speedit_jax.training.step import drop_conditions

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


@pytest.mark.parametrize("strategy", ["speedit", "loss_second_moment", "gradient_noise"])
def test_a_step_with_text(strategy):
    """Whole batches dropped: the text has no effect, and its network gets no other gradient."""
    changes = {"timesteps__strategy": strategy, "training__batch_size": 64}
    step = {}
    for rate in (0.0, 0.99999):
        of = tiny.make_trainer(texts=tiny.TEXTS, model__label_dropout=rate, **changes)
        batch = {"image": np.zeros((64, *tiny.IMAGE), np.float32), "label": np.zeros(64, np.int32)}
        texts = [{"tokens": sign * np.ones((64, 8, 16), np.float16), "length": np.full(64, 5, np.int32)} for sign in (1, -1)]
        run, state = of.train_step(), of.state(tiny.random_like(of.shapes.params))
        losses = [float(run(state, batch | {"text": text}, jax.random.key(0))[1]["loss"]) for text in texts]
        step[rate] = losses
    assert step[0.0][0] != step[0.0][1]
    assert step[0.99999][0] == step[0.99999][1]
