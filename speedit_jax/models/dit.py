"""DiT: a vision transformer conditioned by adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Block, with (shift, scale, gate) x 2 = W SiLU(c) + b, W and b zero at initialisation:
  x <- x + gate_1 * Attention(modulate(LN(x), shift_1, scale_1))
  x <- x + CrossAttention(x, text)                                      with text (models/cross_attention.py)
  x <- x + gate_2 * MLP(modulate(LN(x), shift_2, scale_2))
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from speedit_jax.models import layers
from speedit_jax.models.backbone import ACTIVATIONS, MIXED
from speedit_jax.models.cross_attention import CrossAttention, CrossAttentionFn
from speedit_jax.models.layers import RMSNorm, SwiGLU, dense
from speedit_jax.models.routing import Among

# (q, k, v) [B, T, H, K] -> [B, T, H, K]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

MLPS = ("gelu", "swiglu")


class Attention(nn.Module):
    """Multi-head self-attention: [B, T, D] -> [B, T, D]; with `qk_norm` logits cannot grow with the weights."""

    heads: int
    qk_norm: bool
    attention: AttentionFn
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, angles=None):
        """angles: of rotary positions, as layers.rotate takes them; None turns nothing."""
        width = x.shape[-1]
        head_dim = width // self.heads
        qkv_axes = ("embed", None, "heads", None)
        qkv = dense((3, self.heads, head_dim), layers.xavier, qkv_axes, qkv_axes[1:], self.dtype, "qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # each [B, T, H, K]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        if angles is not None:
            q, k = layers.rotate(q, angles), layers.rotate(k, angles)
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

        def activated(mlp, x):
            return dense(width, layers.xavier, ("mlp", "embed"), (None,), mlp.dtype, "down")(nn.gelu(x, approximate=True))

        # The kernel's gradient needs GELU's result, which is computed again: only `up`'s result is kept.
        return nn.remat(activated, prevent_cse=False)(self, x)


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
      mlp: one of MLPS. SwiGLU is 2/3 as wide, for as many weights, rounded up to a multiple of 16.
      norm: one of layers.NORMS.
      rope: the grid (rows, columns) of tokens whose positions turn queries and keys; None turns nothing.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    attention: AttentionFn
    cross_attention: CrossAttentionFn
    constrain: layers.Constrain
    dtype: jnp.dtype
    mlp: str = "gelu"
    norm: str = "layer"
    rope: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x, c, *text, among: Among | None = None):
        """among: of the route, where these are not all tokens."""
        width = x.shape[-1]
        hidden = int(width * self.mlp_ratio)
        angles = None
        if self.rope is not None:
            angles = jnp.asarray(layers.rope_angles(self.rope, width // self.heads))
            angles = angles if among is None else angles[among.order[:, : x.shape[1]]]
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.block_adaln(self, c)

        y = layers.modulated_norm(self.norm, "norm1", x, shift1, scale1)
        x = x + gate1[:, None] * Attention(self.heads, self.qk_norm, self.attention, self.dtype, name="attention")(y, angles)
        if text:
            x = x + CrossAttention(self.heads, self.cross_attention, self.dtype, name="cross")(x, *text)
        y = layers.modulated_norm(self.norm, "norm2", x, shift2, scale2)
        if self.mlp == "swiglu":
            mlp = SwiGLU(-(-int(hidden * 2 / 3) // 16) * 16, True, self.dtype, name="mlp")
        else:
            mlp = Mlp(hidden, self.dtype, name="mlp")
        x = x + gate2[:, None] * mlp(y)
        return self.constrain(x, ACTIVATIONS), None
