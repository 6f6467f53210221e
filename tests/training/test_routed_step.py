"""The step whose tokens take a route."""

import collections
import functools
import re

import jax
import numpy as np
import pytest
import tiny

from speedit_jax import sharding
from speedit_jax.models.routing import draw_route

PLACE = {"tokens__start": 1, "tokens__tail": 1}
ROUTE = PLACE | {"tokens__method": "route", "model__depth": 4}


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


CELLS = PLACE | {"tokens__pattern": "cells"}
METHODS = {
    "route": PLACE | {"tokens__method": "route"},
    "cells": CELLS | {"tokens__method": "route"},
    "sprint": CELLS | {"tokens__method": "sprint", "tokens__rate": 0.75},
    "mask": PLACE | {"tokens__method": "mask", "tokens__rate": 0.3},
}


@functools.cache
def collectives(backbone: str, method: str | None) -> collections.Counter:
    """How many of each kind the compiled step has, but for those of a linear layer, of its weights' gathering for instance."""
    changes = METHODS[method] if method else {}
    text = (
        tiny.make_trainer((2, 2, 2), model__name=f"{backbone}-tiny/2", model__depth=4, **changes).lower_step().compile().as_text()
    )
    kinds = re.compile(r"= \S+ (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
    found = [(match[1], line) for line in text.splitlines() if (match := kinds.search(line))]
    return collections.Counter(kind for kind, line in found if not re.search(r'op_name="[^"]*/dot_general"', line))


@pytest.mark.slow
@pytest.mark.parametrize("backbone,method", [*(("DiT", method) for method in METHODS), ("DiG", "cells"), ("DiG", "sprint")])
def test_no_token_travels(backbone, method):
    """Beyond those of the linear layers, the compiled step has the collectives of the plain one; MDT's passes have them each."""
    passes, plain = 2 if method == "mask" else 1, collectives(backbone, None)
    assert plain and collectives(backbone, method) <= collections.Counter({kind: passes * count for kind, count in plain.items()})
