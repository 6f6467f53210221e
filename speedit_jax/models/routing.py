"""Which tokens skip the middle blocks, and taking the others out and putting them back: TREAD (arXiv 2501.04765).

A token that skips is neither query nor key nor value there, and arrives unchanged. There are no parameters and no mask tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Route(NamedTuple):
    """The tokens of a batch in two groups.

    Attributes:
      order: [B, T] int32, a permutation of the tokens of each image, first those that the middle blocks see.
      inverse: [B, T] int32, the inverse permutation.
      kept: how many they see, M.
    """

    order: jax.Array
    inverse: jax.Array
    kept: int


def draw_route(key: jax.Array, batch: int, tokens: int, kept: int) -> tuple[jax.Array, jax.Array]:
    """`order` and `inverse` of a Route, with a uniformly random subset of each image; both groups are in raster order."""
    shuffled = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    groups = shuffled[:, :kept], shuffled[:, kept:]
    order = jnp.concatenate([jnp.sort(group, axis=1) for group in groups], axis=1)
    return order.astype(jnp.int32), jnp.argsort(order, axis=1).astype(jnp.int32)


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
