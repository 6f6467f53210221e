"""DiT: a vision transformer conditioned by adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Block, with (shift, scale, gate) x 2 = W SiLU(c) + b, W and b zero at initialisation:
  x <- x + gate_1 * Attention(modulate(LN(x), shift_1, scale_1))
  x <- x + CrossAttention(x, text)                                      with text (models/cross_attention.py)
  x <- x + gate_2 * MLP(modulate(LN(x), shift_2, scale_2))
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from speedit_jax.models import layers
from speedit_jax.models.backbone import ACTIVATIONS, MIXED
from speedit_jax.models.cross_attention import CrossAttention, CrossAttentionFn
from speedit_jax.models.layers import RMSNorm, dense

# (q, k, v) [B, T, H, K] -> [B, T, H, K]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

gelu = layers.recomputed(functools.partial(nn.gelu, approximate=True))


class Attention(nn.Module):
    """Multi-head self-attention: [B, T, D] -> [B, T, D]; with `qk_norm` logits cannot grow with the weights."""

    heads: int
    qk_norm: bool
    attention: AttentionFn
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        head_dim = width // self.heads
        qkv_axes = ("embed", None, "heads", None)
        qkv = dense((3, self.heads, head_dim), layers.xavier, qkv_axes, qkv_axes[1:], self.dtype, "qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # each [B, T, H, K]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        out = checkpoint_name(self.attention(q, k, v), MIXED)
        return dense(width, layers.xavier, ("heads", None, "embed"), (None,), self.dtype, "out", axis=(-2, -1))(out)


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear: [B, T, D] -> [B, T, D]."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        # Column-parallel in, row-parallel out: with both kernels sharded alike XLA:CPU returned wrong gradients.
        x = dense(self.hidden, layers.xavier, ("embed", "mlp"), ("mlp",), self.dtype, "up")(x)
        x = gelu(x)
        return dense(width, layers.xavier, ("mlp", "embed"), (None,), self.dtype, "down")(x)


class DiTBlock(nn.Module):
    """One block: tokens x [B, T, D] and conditioning -> (x [B, T, D], None), the pair that nn.scan wants.

    The conditioning is c, as layers.block_adaln takes it, and with text its tokens [B, L, D] and lengths [B].

    Attributes:
      heads: H.
      mlp_ratio: hidden width of the MLP in D.
      qk_norm: RMSNorm of queries and keys.
      attention: (q, k, v) [B, T, H, K] -> [B, T, H, K].
      cross_attention: to the text's tokens.
      constrain: the activations' sharding.
      dtype: of activations.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    attention: AttentionFn
    cross_attention: CrossAttentionFn
    constrain: layers.Constrain
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c, *text):
        width = x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.block_adaln(self, c)

        y = layers.modulated_layer_norm(x, shift1, scale1)
        x = x + gate1[:, None] * Attention(self.heads, self.qk_norm, self.attention, self.dtype, name="attention")(y)
        if text:
            x = x + CrossAttention(self.heads, self.cross_attention, self.dtype, name="cross")(x, *text)
        y = layers.modulated_layer_norm(x, shift2, scale2)
        x = x + gate2[:, None] * Mlp(int(width * self.mlp_ratio), self.dtype, name="mlp")(y)
        return self.constrain(x, ACTIVATIONS), None
