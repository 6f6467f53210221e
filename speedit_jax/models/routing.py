"""Which tokens skip the middle blocks, and taking the others out and putting them back: TREAD (arXiv 2501.04765).

A token that skips is neither query nor key nor value there, and arrives unchanged. There are no parameters and no mask tokens.
Those that are seen are any of the image, or one of each cell of its grid. The latter are a grid themselves, which is what DiG's
scans want.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Cell = tuple[int, int]  # rows and columns

# Share of tokens that skip -> the cells of which one token is seen.
CELLS: dict[float, Cell] = {0.5: (1, 2), 0.75: (2, 2)}


class Route(NamedTuple):
    """The tokens of a batch in two groups.

    Attributes:
      order: [B, T] int32, a permutation of the tokens of each image, first those that the middle blocks see.
      inverse: [B, T] int32, the inverse permutation.
      kept: how many they see, M.
      cell: rows and columns of the cells of which they see one token each, in raster order of the cells; None: any M tokens, in
        raster order.
    """

    order: jax.Array
    inverse: jax.Array
    kept: int
    cell: Cell | None = None


class Among(NamedTuple):
    """What a block is told of a route, besides the tokens that it sees: arrays of the Route, and the tokens that skip."""

    order: jax.Array
    inverse: jax.Array
    skipping: jax.Array


def draw_route(
    key: jax.Array, batch: int, grid: tuple[int, int], kept: int, cell: Cell | None = None
) -> tuple[jax.Array, jax.Array]:
    """`order` and `inverse` of a Route over `grid`, uniformly random for each image; the tokens that skip are in raster order."""
    tokens = grid[0] * grid[1]
    if cell:
        order = _draw_cells(key, batch, grid, cell)
    else:
        shuffled = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
        groups = shuffled[:, :kept], shuffled[:, kept:]
        order = jnp.concatenate([jnp.sort(group, axis=1) for group in groups], axis=1)
    return order.astype(jnp.int32), jnp.argsort(order, axis=1).astype(jnp.int32)


def _draw_cells(key, batch, grid, cell):
    rows, columns = (side // part for side, part in zip(grid, cell, strict=True))
    within = jax.random.randint(key, (batch, rows, columns), 0, cell[0] * cell[1])
    row = jnp.arange(rows)[:, None] * cell[0] + within // cell[1]
    column = jnp.arange(columns) * cell[1] + within % cell[1]
    seen = (row * grid[1] + column).reshape(batch, -1)
    # Not scattered into an array: over a mesh XLA would gather the tokens of all images for it.
    drawn = jnp.repeat(jnp.repeat(within, cell[0], axis=1), cell[1], axis=2)
    place = jnp.tile(jnp.arange(cell[0] * cell[1]).reshape(cell), (rows, columns))  # in its cell
    is_seen = (drawn == place).reshape(batch, -1)
    skipping = jnp.argsort(is_seen, axis=1, stable=True)[:, : -seen.shape[1]]
    return jnp.concatenate([seen, skipping], axis=1)


@jax.custom_vjp
def _reorder(x, order, inverse):
    del inverse
    return jnp.take_along_axis(x, order[..., None], axis=1, mode="promise_in_bounds")


def _reorder_forward(x, order, inverse):
    return _reorder(x, order, inverse), (order, inverse)


def _reorder_backward(permutations, cotangent):
    # Of a gather JAX would make a scatter that adds, which is slower and, on GPUs, not the same each time.
    order, inverse = permutations
    return _reorder(cotangent, inverse, order), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)


def taken(x: jax.Array, route: Route) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] -> (the tokens that are seen [B, M, D], those that skip [B, T - M, D])."""
    x = _reorder(x, route.order, route.inverse)
    return x[:, : route.kept], x[:, route.kept :]


def taken_back(seen: jax.Array, skipping: jax.Array, route: Route) -> jax.Array:
    """The inverse of `taken`."""
    return _reorder(jnp.concatenate([seen, skipping], axis=1), route.inverse, route.order)
