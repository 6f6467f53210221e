"""Guidance away from the same network with fewer tokens in its middle blocks."""

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
from speedit_jax.sampling.sampler import Settings, make_sampler
from speedit_jax.sampling.sparse_guidance import sparse_networks
from speedit_jax.training import assembly

KEY, INDICES = jax.random.key(5), np.arange(4)
LABELS = INDICES % 3
SETTINGS = Settings(sampler="ddim", num_steps=3, eta=0.0, guidance_scale=2.0, guidance_channels=0, clip=True)
SPARSE = dataclasses.replace(SETTINGS, sparse_strong=0.25, sparse_weak=0.75)
ROUTE = {"model__depth": 3, "tokens__method": "route", "tokens__start": 1, "tokens__tail": 1, "model__label_dropout": 0.0}


@functools.cache
def routed():
    trainer = tiny.make_trainer(ONE, **ROUTE)
    return trainer, tiny.random_like(trainer.shapes.params)


@functools.cache
def draw(settings, first=0):
    trainer, params = routed()
    run = make_sampler(trainer.model, trainer.diffusion, settings, trainer.mesh)
    return np.asarray(run(params, KEY, INDICES + first, (INDICES + first) % 3))


def networks(rates):
    """The two of `sparse_networks`, as functions (x, t), with inputs for them."""
    trainer, params = routed()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, *IMAGE), np.float32))
    both = sparse_networks(trainer.model, params, rates, KEY, jnp.asarray(INDICES), trainer.diffusion.schedule_index)
    return both, (x, jnp.full(4, 300), jnp.asarray(LABELS))


def test_the_formula():
    (strong, weak), (x, t, y) = networks((0.25, 0.75))

    @jax.jit
    def outputs(x, t):
        channels = IMAGE[-1]
        both = guided(strong, y, None, 3.0, channels, weak)(x, t)
        same = guided(strong, y, None, 3.0, channels, strong)(x, t)
        return both, same, strong(x, t, y), weak(x, t, y)

    both, same, one, other = (np.asarray(out)[..., : IMAGE[-1]] for out in outputs(x, t))
    np.testing.assert_allclose(both, 3 * one - 2 * other, atol=1e-6)
    np.testing.assert_allclose(same, one, atol=1e-6)
    assert np.abs(one - other).max() > 1e-3


def test_without_shares_both_are_the_network():
    trainer, params = routed()
    both, arguments = networks((0.0, 0.0))
    dense = jax.jit(trainer.model.apply)(params, *arguments)
    for network in both:
        np.testing.assert_allclose(jax.jit(network)(*arguments), dense, atol=1e-6)  # its weights are constants here


def test_samples():
    """It needs no null label; a scale of 1 is the strong network alone, which sees all tokens at a share of 0."""
    plain = draw(dataclasses.replace(SETTINGS, guidance_scale=1.0))
    alone = draw(dataclasses.replace(SPARSE, guidance_scale=1.0, sparse_strong=0.0))
    np.testing.assert_array_equal(alone, plain)
    assert np.abs(draw(SPARSE) - plain).max() > 1e-2
    assert np.abs(draw(dataclasses.replace(SPARSE, guidance_scale=1.0)) - plain).max() > 1e-3


def test_an_image_does_not_depend_on_its_batch():
    np.testing.assert_allclose(draw(SPARSE, 2)[:2], draw(SPARSE)[2:], atol=1e-5)


@pytest.mark.parametrize(
    "strong, weak, message",
    [
        (0.5, 0.25, r"0 <= sparse_strong < sparse_weak < 1"),
        (0.0, 1.0, r"0 <= sparse_strong < sparse_weak < 1"),
        (0.0, 0.05, r"of 16 tokens both make as many skip"),
    ],
)
def test_impossible_shares(strong, weak, message):
    with pytest.raises(UserError, match=message):
        draw(dataclasses.replace(SPARSE, sparse_strong=strong, sparse_weak=weak))


@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_cells_that_the_grid_does_not_have(name):
    """Five rows of four tokens: cells of 1 x 2 are trained with, and there are none of 2 x 2."""
    config = tiny.make_config(**ROUTE | {"model__name": name, "tokens__pattern": "cells"})
    mesh, diffusion = tiny.make_mesh(ONE), assembly.make_diffusion(config)
    model = assembly.make_model(config, mesh, (10, 8, 1), 3)
    cells = dataclasses.replace(SETTINGS, sparse_strong=0.0, sparse_weak=0.5)
    make_sampler(model, diffusion, cells, mesh)
    with pytest.raises(UserError, match=r"sparse_weak=0\.75: the grid of 5 x 4 tokens has no cells of 2 x 2"):
        make_sampler(model, diffusion, dataclasses.replace(cells, sparse_weak=0.75), mesh)


def test_only_of_routed_models_and_of_one_guide():
    plain, (trainer, _) = tiny.make_trainer(), routed()
    with pytest.raises(UserError, match=r"sparse_weak=0\.75.*trained with tokens\.method=route"):
        make_sampler(plain.model, plain.diffusion, SPARSE, plain.mesh)
    with pytest.raises(UserError, match=r"sparse_weak=0\.75.*another guide"):
        make_sampler(trainer.model, trainer.diffusion, SPARSE, trainer.mesh, guide=trainer.model)


def test_what_is_off_is_not_recorded():
    """So that what earlier versions drew can be gone on with."""
    assert "sparse_weak" not in SETTINGS.record() and SPARSE.record()["sparse_weak"] == 0.75
    assert Settings(**SETTINGS.record()) == SETTINGS
