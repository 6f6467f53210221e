"""The step of a run with data.mask, whose network is told a part of each image."""

import jax
import numpy as np
import pytest
import tiny
from tiny import ONE

from speedit_jax.diffusion.inverse import latent_mask
from speedit_jax.diffusion.masks import draw_known, hint
from speedit_jax.errors import UserError
from speedit_jax.testing.vae_weights import write_vae
from speedit_jax.training.inputs import known_parts, stream
from speedit_jax.training.step import make_gradient, make_loss

MASKED = {"data__mask": "mixed"}


def without_hint(params):
    return {name: leaf for name, leaf in params.items() if name != "hint"}


def same_start(plain, masked, seed=0):
    """States of both with the same weights, but for the hint's layer, which is as it is at the start."""
    params = tiny.random_like(plain.shapes.params, seed)
    start = jax.tree.map(np.asarray, masked.model.init(jax.random.key(0))["hint"])
    return plain.state(params), masked.state(params | {"hint": start})


def test_off_is_the_plain_step():
    text = [tiny.make_trainer(**of).lower_step().as_text() for of in ({}, {"data__mask_all": 0.9})]
    assert text[0] == text[1]
    assert "hint" not in tiny.make_trainer().shapes.params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"model__name": "DiG-tiny/2", "model__depth": 4}, marks=pytest.mark.slow),
        {"diffusion__path": "linear", "timesteps__strategy": "uniform", "model__patch_bottleneck": 8},
        pytest.param(
            {"tokens__method": "route", "tokens__start": 1, "tokens__tail": 1, "model__depth": 4, "training__accumulation": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dit", "dig", "flow", "route"],
)
def test_the_first_step_is_the_plain_one(changes):
    plain, masked = tiny.make_trainer(**changes), tiny.make_trainer(**MASKED, **changes)
    tiny.assert_same(without_hint(masked.model.init(jax.random.key(1))), plain.model.init(jax.random.key(1)))
    kernel = masked.model.init(jax.random.key(1))["hint"]["kernel"]
    assert kernel.shape == (8, 32) and not np.asarray(kernel).any()  # 2 x 2 pixels of an image and its mask
    batch, key = tiny.random_batch(), jax.random.key(5)
    states = same_start(plain, masked)
    (after, metrics), (told, found) = (t.train_step()(s, batch, key) for t, s in zip((plain, masked), states, strict=True))
    for name in ("loss", "mse", "mse_q1"):  # of two programs, in which XLA may fuse the same sums differently
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-6, err_msg=name)
    assert np.asarray(told.params["hint"]["kernel"]).any(), "it learns from the first step on"
    tiny.assert_same(told.timesteps, after.timesteps)


@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_the_network_begins_as_the_plain_one_to_the_bit(name):
    """Operation by operation: compiled, the two are different programs."""
    plain, masked = (tiny.make_trainer(model__name=name, **of) for of in ({}, MASKED))
    before, after = (trainer.params for trainer in same_start(plain, masked))
    rng = np.random.default_rng(0)
    image, x_t = rng.normal(size=(2, 2, *tiny.IMAGE)).astype(np.float32)
    told = hint(image, rng.random((2, *tiny.IMAGE[:2], 1)) < 0.5)
    t, y = np.full(2, 500), np.arange(2)
    with jax.disable_jit():
        tiny.assert_same(masked.model.apply(after, x_t, t, y, hint=told), plain.model.apply(before, x_t, t, y))


def test_what_is_hidden_is_not_told():
    """The output depends on the known pixels, and neither in value nor in gradient on the others."""
    trainer = tiny.make_trainer(**MASKED)
    params = tiny.random_like(trainer.shapes.params)
    rng = np.random.default_rng(0)
    image, other = rng.normal(size=(2, 4, *tiny.IMAGE)).astype(np.float32)
    known = np.asarray(draw_known(jax.random.key(0), 4, tiny.IMAGE[:2], "mixed", 0.0))
    x_t, t, y = rng.normal(size=(4, *tiny.IMAGE)).astype(np.float32), np.full(4, 500), np.arange(4)

    def output(image):
        return trainer.model.apply(params, x_t, t, y, hint=hint(image, known))

    tiny.assert_same(output(image), output(np.where(known, image, other)))
    assert (np.asarray(output(image)) != np.asarray(output(other))).any()
    gradient = np.asarray(jax.grad(lambda image: (output(image) ** 2).sum())(image))
    assert not gradient[~known].any() and gradient[known].any()
    # Nothing known is no hint, to the bit of the hint's own arithmetic: it adds zeros.
    nothing = trainer.model.apply(params, x_t, t, y, hint=np.zeros((4, 8, 8, 2), np.float32))
    tiny.assert_same(nothing, trainer.model.apply(params, x_t, t, y))


@pytest.mark.parametrize(("shape", "accumulation"), [((2, 2, 2), 1), (ONE, 4)], ids=str)
def test_neither_mesh_nor_microbatches_change_the_gradient(shape, accumulation):
    """Of every leaf in float64, the hint's included; tolerance as tests/training/test_gradients.py."""

    def gradient(shape, accumulation):
        rng = np.random.default_rng(1)
        batch = {name: rng.normal(size=(tiny.BATCH, *tiny.IMAGE)) for name in ("x0", "noise")}
        batch |= {"t": rng.integers(0, 1000, tiny.BATCH), "y": rng.integers(0, tiny.CLASSES, tiny.BATCH).astype(np.int32)}
        batch |= {name: rng.uniform(0.5, 1.5, tiny.BATCH) for name in ("weight", "importance")}
        batch["known"] = rng.random((tiny.BATCH, 8, 8, 1)) < 0.5
        with jax.enable_x64(True):
            trainer = tiny.make_trainer(shape, **MASKED)
            params = jax.device_put(tiny.random_like(trainer.shapes.params, dtype=np.float64), trainer.shardings.params)
            function = jax.jit(make_gradient(make_loss(trainer.model, trainer.diffusion), accumulation))
            with jax.set_mesh(trainer.mesh):
                return jax.tree.map(np.asarray, function(params, jax.device_put(batch, trainer.rows)))

    grads, loss, _ = gradient(shape, accumulation)
    reference = gradient(ONE, 1)
    errors = tiny.relative_errors(grads, reference[0])
    assert "hint/kernel" in errors and max(errors.values()) < 1e-12
    np.testing.assert_allclose(loss, reference[1], rtol=1e-12)


def test_masks_are_those_of_the_steps_key():
    """The metrics of a step are those of the loss with the masks of its stream; another step draws others."""
    trainer = tiny.make_trainer(**MASKED, timesteps__strategy="uniform", model__label_dropout=0.0)
    state, batch, key = trainer.state(tiny.random_like(trainer.shapes.params)), tiny.random_batch(), jax.random.key(2)
    _, metrics = trainer.train_step()(state, batch, key)
    of_step = jax.random.fold_in(key, 0)
    known = known_parts(stream(of_step, "masks"), batch["image"].shape, trainer.config.data, None)
    t, weight, importance = trainer.strategy.sample(stream(of_step, "timesteps"), tiny.BATCH, state.step, state.timesteps)
    noise = jax.random.normal(stream(of_step, "noise"), batch["image"].shape)
    inputs = {"x0": batch["image"], "noise": noise, "t": t, "weight": weight, "importance": importance, "y": batch["label"]}
    losses = [
        float(make_loss(trainer.model, trainer.diffusion)(state.params, inputs | {"known": mask})[0]) for mask in (known, ~known)
    ]
    assert float(metrics["loss"]) == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert (known != known_parts(stream(jax.random.fold_in(key, 1), "masks"), (16, 8, 8, 1), trainer.config.data, None)).any()


def test_latents_are_known_where_sampling_knows_them(tmp_path):
    from speedit_jax.encoders.autoencoder import Autoencoder

    identity = Autoencoder(str(write_vae(tmp_path / "vae", "four")), tiny.make_mesh(ONE)).identity
    data, key = tiny.make_config(**MASKED).data, jax.random.key(0)
    ratio = 32 // Autoencoder(identity["vae"], tiny.make_mesh(ONE)).latent_shape((32, 32, 3))[0]
    assert ratio > 1
    pixels = draw_known(key, 6, (8 * ratio, 6 * ratio), "mixed", 0.25)
    tiny.assert_same(known_parts(key, (6, 8, 6, 4), data, identity), latent_mask(np.asarray(pixels), (8, 6)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__mask": "circles"}, r"unknown data\.mask 'circles'.*boxes, strokes, mixed"),
        (MASKED | {"data__mask_all": 1.0}, r"data\.mask_all=1\.0: must lie in \[0, 1\)"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.make_trainer(**changes)
