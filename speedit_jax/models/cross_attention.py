"""Cross-attention from the tokens of an image to those of its text (PixArt-alpha, Chen et al., arXiv 2310.00426).

  x <- x + CrossAttention(q from x, k and v from the text)

between a block's mixer and its MLP, without norm, modulation or gate; its last kernel is zero at first, so that training starts
from the network without text.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from speedit_jax.models import layers
from speedit_jax.models.backbone import MIXED
from speedit_jax.models.layers import dense

# (q [B, T, H, K], k and v [B, L, H, K], length int [B]) -> [B, T, H, K]
CrossAttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class CrossAttention(nn.Module):
    """Tokens x [B, T, D] and text [B, L, D], of which length [B] tokens are valid -> [B, T, D].

    Attributes:
      heads: H.
      attention: softmax attention that does not look at padding.
      dtype: of activations.
    """

    heads: int
    attention: CrossAttentionFn
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, text, length):
        width = x.shape[-1]
        head_dim = width // self.heads
        column = ("embed", "heads", None)
        q = dense((self.heads, head_dim), layers.xavier, column, column[1:], self.dtype, "q")(x)
        kv_axes = ("embed", None, "heads", None)
        kv = dense((2, self.heads, head_dim), layers.xavier, kv_axes, kv_axes[1:], self.dtype, "kv")(text)
        out = checkpoint_name(self.attention(q, kv[:, :, 0], kv[:, :, 1], length), MIXED)
        return dense(width, layers.zeros, ("heads", None, "embed"), (None,), self.dtype, "out", axis=(-2, -1))(out)
