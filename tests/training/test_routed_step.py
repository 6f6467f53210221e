"""The step whose tokens take a route."""

import re

import jax
import numpy as np
import pytest
import tiny

from speedit_jax import sharding
from speedit_jax.models.routing import draw_route

ROUTE = {"tokens__method": "route", "tokens__start": 1, "tokens__tail": 1, "model__depth": 4}


OFF = {"tokens__rate": 0.9, "tokens__start": 0, "tokens__path_drop": 7.0}


def test_a_method_that_is_off_leaves_the_step_as_it_is():
    text = [tiny.make_trainer(**of).lower_step().as_text() for of in ({}, OFF)]
    assert text[0] == text[1]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_every_mesh_draws_the_same(shape):
    mesh = tiny.make_mesh(shape)
    with jax.set_mesh(mesh):
        drawn = jax.jit(lambda key: draw_route(key, 16, (4, 4), 6), out_shardings=sharding.batch_sharding(mesh))(
            jax.random.key(3)
        )
    tiny.assert_same(drawn, draw_route(jax.random.key(3), 16, (4, 4), 6))


def test_a_step_draws_a_route_of_its_own():
    """The same weights and batch at two steps; and the same step again, to the bit."""
    trainer = tiny.make_trainer(timesteps__strategy="uniform", **ROUTE)
    step, batch, key = trainer.train_step(), tiny.random_batch(), jax.random.key(0)
    state = trainer.state(tiny.random_like(trainer.shapes.params))
    (after, first), (again, same) = (step(state, batch, key) for _ in range(2))
    tiny.assert_same((after, first), (again, same))
    assert np.isfinite(first["loss"]) and np.isfinite(first["grad_norm"])


@pytest.mark.slow
def test_no_token_travels():
    """The compiled step has no kind of collective that the plain one lacks, and no more of any."""

    def collectives(**changes):
        text = tiny.make_trainer((2, 2, 2), model__depth=4, **changes).lower_step().compile().as_text()
        kinds = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
        return {kind: len(re.findall(rf"= \S+ {kind}(?:-start)?\(", text)) for kind in kinds}

    plain, routed = collectives(), collectives(**{key: value for key, value in ROUTE.items() if key != "model__depth"})
    assert plain["all-gather"] > 0
    parts = 3  # each part of the depth is a loop with the collectives of a block
    assert all(routed[kind] <= parts * plain[kind] for kind in plain), (plain, routed)
    assert all((routed[kind] > 0) <= (plain[kind] > 0) for kind in plain), (plain, routed)
