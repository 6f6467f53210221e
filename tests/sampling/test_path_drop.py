"""Path-drop guidance: the formula in two passes, at steps with and without guidance, and who has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import IMAGE, ONE

from speedit_jax.diffusion.samplers import guided
from speedit_jax.errors import UserError
from speedit_jax.sampling.path_drop import without_middle
from speedit_jax.sampling.sampler import Settings, image_noise, make_sampler

KEY, INDICES = jax.random.key(5), np.arange(4)
LABELS = INDICES % 3
SETTINGS = Settings("euler", 4, eta=0.0, guidance_scale=3.0, guidance_channels=0, clip=False, guidance_low=0.3, guidance_high=0.8)
PDG = dataclasses.replace(SETTINGS, path_drop_guidance=True)
SPRINT = {"model__depth": 3, "tokens__method": "sprint", "tokens__start": 1, "tokens__tail": 1}
FLOW = {"diffusion__path": "linear", "diffusion__variance": "fixed_small", "timesteps__strategy": "uniform"}


@functools.cache
def trained(**changes):
    trainer = tiny.make_trainer(ONE, **SPRINT | changes)
    return trainer, tiny.random_like(trainer.shapes.params)


@functools.cache
def predictions(**changes):
    """(v_c, v_u), jitted functions of (x, t): a pass of all blocks, and one whose every image is dropped, of the null label."""
    trainer, params = trained(**changes)
    apply, nulls, dropped = trainer.model.apply, jnp.full(4, trainer.model.null_label), jnp.ones(4, bool)
    conditional = jax.jit(lambda x, t: apply(params, x, t, LABELS))
    return conditional, jax.jit(lambda x, t: apply(params, x, t, nulls, dropped=dropped))


@pytest.mark.slow
def test_the_formula_at_steps_with_and_without_guidance():
    trainer, params = trained()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, *IMAGE), np.float32))
    scales = np.where(np.arange(1000) < 500, 3.0, 1.0)
    network, guide = functools.partial(trainer.model.apply, params), without_middle(trainer.model, params, 10)
    channels = IMAGE[-1]
    denoise = jax.jit(guided(network, jnp.asarray(LABELS), None, scales, channels, guide))
    for level, guides in ((300, True), (700, False)):
        t = jnp.full(4, level)
        own, other = (np.asarray(v(x, t))[..., :channels] for v in predictions())
        assert np.abs(own - other).max() > 1e-2
        expected = other + 3 * (own - other) if guides else own
        np.testing.assert_allclose(denoise(x, t)[..., :channels], expected, atol=1e-6)


def test_a_sampler_whose_first_and_last_steps_are_not_guided():
    """Euler's steps, one by one: two passes each inside of the interval, and one outside."""
    (conditional, other), scale = predictions(**FLOW), PDG.guidance_scale
    x = np.asarray(image_noise(KEY, jnp.asarray(INDICES), 0, IMAGE))
    trainer, params = trained(**FLOW)
    guided_steps = 0
    for s in (0.0, 0.25, 0.5, 0.75):
        t = trainer.diffusion.model_time(jnp.full(4, s, jnp.float32))
        v = np.asarray(conditional(x, t))
        if PDG.guidance_low <= 1 - s <= PDG.guidance_high:
            v_u = np.asarray(other(x, t))
            v, guided_steps = v_u + scale * (v - v_u), guided_steps + 1
        x = x + 0.25 * v
    assert guided_steps == 2
    drawn = make_sampler(trainer.model, trainer.diffusion, PDG, trainer.mesh)(params, KEY, INDICES, LABELS)
    np.testing.assert_allclose(drawn, x, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens__method": "route"}, r"path_drop_guidance is for models that were trained with tokens\.method=sprint"),
        ({"tokens__path_drop": 0.0}, r"tokens\.path_drop=0"),
        ({"model__label_dropout": 0.0}, r"path_drop_guidance needs a model trained with classes or text"),
    ],
)
def test_who_has_it(changes, message):
    trainer = tiny.make_trainer(**SPRINT | changes)
    with pytest.raises(UserError, match=message):
        make_sampler(trainer.model, trainer.diffusion, dataclasses.replace(PDG, sampler="ddim"), trainer.mesh)


def test_there_is_one_guide():
    trainer, _ = trained()
    settings = dataclasses.replace(PDG, sampler="ddim")
    with pytest.raises(UserError, match=r"path_drop_guidance: there is another guide"):
        make_sampler(trainer.model, trainer.diffusion, settings, trainer.mesh, guide=trainer.model)
    with pytest.raises(UserError, match=r"sparse_weak=0\.5: sparse guidance is for models.*tokens\.method=route"):
        make_sampler(trainer.model, trainer.diffusion, dataclasses.replace(settings, sparse_weak=0.5), trainer.mesh)
    with pytest.raises(UserError, match=r"path_drop_guidance has no effect at guidance_scale=1"):
        make_sampler(trainer.model, trainer.diffusion, dataclasses.replace(settings, guidance_scale=1.0), trainer.mesh)


def test_what_is_off_is_not_recorded():
    assert "path_drop_guidance" not in SETTINGS.record() and PDG.record()["path_drop_guidance"]
