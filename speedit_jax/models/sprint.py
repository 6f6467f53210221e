"""SPRINT (arXiv 2510.21986): middle blocks that see few tokens, fused with what all tokens were before them.

The blocks are f, g and h, one after the other; in training g sees only the tokens S of a route. With a mask token m,

  f_t = f(x),   g_pad = g(f_t[S]) at S and m elsewhere,   h(W [g_pad ; f_t] + b).

In training, path drop replaces all of g_pad by m in some images. So guidance can lead away from the network without g. W begins
as [I ; 0] and b as 0: while g sees all tokens, the network is then the plain one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models import layers
from speedit_jax.models.layers import dense
from speedit_jax.models.routing import Route, taken_back


def _first_half(key, shape, dtype=jnp.float32):
    """[I ; 0], of shape [2 D, D]: the first half of the input."""
    del key
    return jnp.eye(*shape, dtype=dtype)


class Fusion(nn.Module):
    """The mask token m, and W [g_pad ; f_t] + b."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, before: jax.Array, seen: jax.Array, route: Route | None, dropped: jax.Array | bool | None) -> jax.Array:
        """What the last blocks get, [B, T, D].

        Args:
          before: f_t [B, T, D].
          seen: what g made of the tokens of `route`, [B, M, D]; of all tokens where that is None.
          dropped: bool [B], the images whose g_pad is m everywhere; None: none. True: all, and `seen` is not looked at.
        """
        width = before.shape[-1]
        mask = self.param("mask", nn.with_logical_partitioning(layers.normal_002, (None,)), (width,), jnp.float32)
        mask = jnp.broadcast_to(mask.astype(before.dtype), before.shape)
        if dropped is True:
            padded = mask
        else:
            padded = seen if route is None else taken_back(seen, mask[:, route.kept :], route)
            padded = padded if dropped is None else jnp.where(dropped[:, None, None], mask, padded)
        both = jnp.concatenate([padded, before], axis=-1)
        return dense(width, _first_half, (None, "embed"), (None,), self.dtype, "fusion")(both)
