"""Sparse guidance (arXiv 2601.01608): a network trained with a route is guided away from itself with fewer tokens.

  (1)  D = w D(x, t, y; strong) + (1 - w) D(x, t, y; weak)

Both are told the label; strong and weak are the shares of tokens that skip the middle blocks, and the cost is theirs. Which
tokens skip is drawn anew at each level and for each of the two. Like an image's noise, it depends on the key, the image's number
and the level, and not on its batch. The paper's text draws each token by itself; here a fixed number skips, as in its code and
in its FLOPs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from speedit_jax.diffusion.samplers import Architecture
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.models.routing import CELLS, Route, draw_route

_STREAM = 2**28  # of an image's key; those of its noise count from 0


def check_sparse(strong: float, weak: float, model: Model, guided: bool) -> None:
    """Raises a UserError for shares that there is no such guidance of.

    Args:
      guided: whether there is another guide.
    """
    if strong == weak:
        return
    given = f"sparse_strong={strong}, sparse_weak={weak}"
    if model.kept is None or model.path_drop is not None or model.interpolater:
        raise UserError(f"{given}: sparse guidance is for models that were trained with tokens.method=route")
    if guided:
        raise UserError(f"{given}: there is another guide already; choose one")
    if not 0 <= strong < weak < 1:
        raise UserError(f"{given}: must be 0 <= sparse_strong < sparse_weak < 1")
    if model.cell and not {strong, weak} <= {0, *CELLS}:
        raise UserError(f"{given}: with tokens.pattern=cells they must be of 0, {', '.join(map(str, CELLS))}")
    for rate in (strong, weak) if model.cell else ():
        cell = CELLS.get(rate, (1, 1))
        if any(side % part for side, part in zip(model.grid, cell, strict=True)):
            grid, wanted = (f"{rows} x {columns}" for rows, columns in (model.grid, cell))
            raise UserError(f"{given}: the grid of {grid} tokens has no cells of {wanted}, which a share of {rate} wants")
    if _kept(model, strong) == _kept(model, weak):
        raise UserError(f"{given}: of {model.tokens} tokens both make as many skip, so nothing would be guided")


def _kept(model: Model, rate: float) -> int:
    """How many tokens the middle blocks see where this share of them skips."""
    return model.tokens - int(rate * model.tokens)


def sparse_networks(
    model: Model,
    params: Any,
    rates: tuple[float, float],
    key: jax.Array,
    indices: jax.Array,
    schedule_index: Callable[[jax.Array], jax.Array],
) -> tuple[Architecture, Architecture]:
    """The network with each of two shares of tokens that skip the middle blocks; a share of 0 is the network itself.

    Args:
      key, indices: of the images' noise.
      schedule_index: of what the network is told, the level.
    """

    def network(number: int, rate: float) -> Architecture:
        kept = _kept(model, rate)
        cell = CELLS.get(rate) if model.cell else None

        def route(level):
            def one(index, level):
                of_image = jax.random.fold_in(jax.random.fold_in(key, index), _STREAM + number)
                order, inverse = draw_route(jax.random.fold_in(of_image, level), 1, model.grid, kept, cell)
                return order[0], inverse[0]

            return Route(*jax.vmap(one)(indices, jnp.broadcast_to(level, indices.shape)), kept, cell)

        def apply(x, t, y):
            options = {} if kept == model.tokens else {"route": route(schedule_index(t))}
            return model.apply(params, x, t, y, **options)

        return apply

    return network(0, rates[0]), network(1, rates[1])
