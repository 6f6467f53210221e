"""Masked training: what stands in for the tokens that the encoder does not see (MDT, arXiv 2303.14389, its first version).

In the masked pass of a step the first blocks, the encoder, see only some of an image's tokens. The side-interpolater guesses the
others, and the last blocks, the decoder, see all. It belongs to training alone: samplers, averages and exports do not have it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models import layers
from speedit_jax.models.backbone import Backbone
from speedit_jax.models.condition import TextShape
from speedit_jax.models.routing import Route, taken_back


class SideInterpolater(nn.Module):
    """One learned token in the place of each masked token, and a block that turns them into guesses.

    Attributes:
      make_block: the block's constructor: name -> module.
      grid: rows and columns of the tokens.
      position_scale: divides positions.
    """

    make_block: Callable[..., nn.Module]
    grid: tuple[int, int]
    position_scale: float

    @nn.compact
    def __call__(self, seen: jax.Array, route: Route, *conditioning: jax.Array) -> jax.Array:
        """The tokens that `route` keeps [B, M, D] -> all [B, T, D], where those that it keeps are as they came."""
        batch, kept, width = seen.shape
        init = nn.with_logical_partitioning(layers.normal_002, (None,))
        token = self.param("token", init, (width,), jnp.float32).astype(seen.dtype)
        masked = jnp.broadcast_to(token, (batch, route.order.shape[1] - kept, width))
        tokens = taken_back(seen, masked, route)
        positions = layers.sincos_position_table(*self.grid, width, self.position_scale)
        guessed, _ = self.make_block(name="side")(tokens + jnp.asarray(positions, tokens.dtype), *conditioning)
        is_masked = route.inverse >= kept
        return jnp.where(is_masked[..., None], guessed, tokens)


@dataclasses.dataclass(frozen=True)
class Interpolater:
    """The side-interpolater as pure functions.

    Attributes:
      init: key -> parameters, a nested dict of float32 arrays.
      apply: (parameters, kept tokens [B, M, D], route, a block's conditioning, ...) -> all tokens [B, T, D].
      axes: like the parameters, with a tuple of logical axis names for each.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    axes: Any


def make_interpolater(plain: Backbone, sharded: Backbone, grid: tuple[int, int], text: TextShape | None) -> Interpolater:
    """Of a network's blocks.

    Args:
      plain: the network on one device, which makes the initial parameters.
      sharded: the same on the mesh.
      grid: rows and columns of the tokens.
      text: the form of its text, if it has any.
    """
    width, ids = plain.width, jnp.arange(grid[0] * grid[1])[None]
    initial, on_mesh = (SideInterpolater(of.make_block(0, grid, None), grid, of.position_scale) for of in (plain, sharded))

    def boxed_init(key):
        conditioning = (jnp.zeros((1, 6, width) if plain.adaln_single else (1, width)),)
        if plain.text == "cross":
            conditioning += (jnp.zeros((1, text.length, width)), jnp.zeros((1,), jnp.int32))
        return initial.init(key, jnp.zeros((1, 1, width)), Route(ids, ids, 1), *conditioning)["params"]

    boxes = jax.eval_shape(boxed_init, jax.random.key(0))
    return Interpolater(
        init=lambda key: nn.meta.unbox(boxed_init(key)),
        apply=lambda params, *given: on_mesh.apply({"params": params}, *given),
        axes=jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)),
    )
