"""DiT: a vision transformer conditioned by adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Block, with (shift, scale, gate) x 2 = W SiLU(c) + b, W and b zero at initialisation:
  x <- x + gate_1 * Attention(modulate(LN(x), shift_1, scale_1))
  x <- x + gate_2 * MLP(modulate(LN(x), shift_2, scale_2))
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models import layers
from speedit_jax.models.layers import dense

# (q, k, v) [B, T, H, K] -> [B, T, H, K]
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

ACTIVATIONS = ("batch", None, None)  # [B, T, D]

# What the backward pass finds saved of each layer; the rest is computed again.
REMAT_POLICIES = {
    "none": None,  # everything saved: fastest, most memory
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the outputs of the linear layers
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input: least memory, about a third more FLOPs
}


class Attention(nn.Module):
    """Multi-head self-attention: [B, T, D] -> [B, T, D]."""

    heads: int
    attention: AttentionFn
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        head_dim = width // self.heads
        qkv_axes = ("embed", None, "heads", None)
        qkv = dense((3, self.heads, head_dim), layers.xavier, qkv_axes, qkv_axes[1:], self.dtype, "qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # each [B, T, H, K]
        out = self.attention(q, k, v)
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
        x = nn.gelu(x, approximate=True)
        return dense(width, layers.xavier, ("mlp", "embed"), (None,), self.dtype, "down")(x)


class DiTBlock(nn.Module):
    """One block; returns a pair because nn.scan carries the first and stacks the second."""

    heads: int
    mlp_ratio: float
    attention: AttentionFn
    constrain: layers.Constrain
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c):
        width = x.shape[-1]
        modulation = dense((6, width), layers.zeros, ("embed", None, None), (None, None), self.dtype, "adaLN")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, i] for i in range(6))  # each [B, D]

        y = layers.modulate(layers.layer_norm(x), shift1, scale1)
        x = x + gate1[:, None] * Attention(self.heads, self.attention, self.dtype, name="attention")(y)
        y = layers.modulate(layers.layer_norm(x), shift2, scale2)
        x = x + gate2[:, None] * Mlp(int(width * self.mlp_ratio), self.dtype, name="mlp")(y)
        return self.constrain(x, ACTIVATIONS), None


class DiT(nn.Module):
    """The backbone.

    Attributes:
      width, depth, heads, patch, mlp_ratio: D, N, H, P and the MLP's expansion.
      label_rows: rows of the label table, the null label's included; 0 is unconditional.
      out_channels: C, or 2C with a learned variance.
      attention, constrain: what differs with the hardware: the attention kernel and the activations' sharding.
      remat: one of REMAT_POLICIES.
      scan_unroll: layers per iteration of the scan over depth.
      dtype: of activations and matmul inputs; parameters are float32.
    """

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float
    label_rows: int
    out_channels: int
    attention: AttentionFn
    constrain: layers.Constrain
    remat: str
    scan_unroll: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """x [B, H, W, C], t [B], y [B] int (ignored when unconditional) -> [B, H, W, out_channels] float32."""
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        c = layers.TimestepEmbedder(self.width, self.dtype, name="timestep")(t)
        if self.label_rows:
            c = c + layers.LabelEmbedder(self.label_rows, self.width, self.dtype, name="label")(y)

        # [B, T, D]
        tokens = layers.patchify(x, self.patch).astype(self.dtype)
        tokens = dense(self.width, layers.xavier, (None, "embed"), (None,), self.dtype, "patch")(tokens)
        positions = layers.sincos_position_table(*grid, self.width)
        tokens = self.constrain(tokens + jnp.asarray(positions, self.dtype), ACTIVATIONS)

        block = DiTBlock
        if self.remat != "none":
            # prevent_cse guards unrolled code; inside a scan it only blocks fusion.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.mlp_ratio, self.attention, self.constrain, self.dtype, name="blocks")
        tokens, _ = blocks(tokens, c)

        modulation = dense((2, self.width), layers.zeros, ("embed", None, None), (None, None), self.dtype, "final_adaLN")
        shift, scale = jnp.moveaxis(modulation(nn.silu(c)), 1, 0)
        tokens = layers.modulate(layers.layer_norm(tokens), shift, scale)
        features = self.patch**2 * self.out_channels
        tokens = dense(features, layers.zeros, ("embed", None), (None,), self.dtype, "final")(tokens)
        out = layers.unpatchify(tokens, grid, self.patch)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))
