"""DiG: diffusion with gated linear attention, linear in the number of tokens (Zhu et al., arXiv 2405.18428).

Block, adaLN-Zero as in DiT, x on the token grid in raster order:
  x <- x + gate_1 * GLA_i(modulate(norm(x), shift_1, scale_1))
  x <- x + CrossAttention(x, text)                              with text (models/cross_attention.py)
  x <- x + gate_2 * SwiGLU(modulate(norm(x), shift_2, scale_2))
  x <- DWConv3x3(x)                                             on the residual stream itself, the identity at first

GLA sees the past of one scan order only; the orders of four blocks in turn cover the plane: raster, reversed raster,
column by column, reversed. The published code turns and flips the tokens between blocks and so leaves them misordered when
the depth is no multiple of four or the grid no square; here tokens stay in raster order and each GLA reads them in its own
(docs/gla.md says why the two are the same network).
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
from speedit_jax.models.routing import Among, Cell, Route, taken, taken_back

# (q, k, v, log_g, reverse=) -> o, as kernels.gla.gla
GlaFn = Callable[..., jax.Array]
# (a function of a block and arrays, save_products=) -> the same, as backbone.remat_part
RematPart = Callable[..., Callable]

# How many scan orders: 1 is causal, 2 both ways along rows, 4 columns too; the i-th is (columns first?, reversed?).
ORDERS = {
    1: ((False, False),),
    2: ((False, False), (False, True)),
    4: ((False, False), (False, True), (True, False), (True, True)),
}
CONVOLUTIONS = ("identity", "random", "none")

_GATE_RANK = 16
_GATE_TEMPERATURE = 16.0  # divides the log-gates: the state forgets slowly at first, exp(log_g) = 0.958
_gla_init = nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")  # xavier with a gain of 2^-2.5


def _projection(features, axes, dtype, name, init=_gla_init, axis=-1):
    """A linear layer without bias."""
    return dense(features, init, axes, None, dtype, name, axis=axis)


@layers.recomputed
def _log_gate(x):
    return jax.nn.log_sigmoid(x.astype(jnp.promote_types(x.dtype, jnp.float32))) / _GATE_TEMPERATURE


@layers.recomputed
def _swish_times(x, y):
    return y * nn.silu(x)


class GatedLinearAttention(nn.Module):
    """[B, T, D] -> [B, T, D], causal in the order of its tokens; K = D / (2 H) and V = D / H.

    Attributes:
      heads: H.
      reverse: whether a token sees the later ones instead of the earlier ones.
      gla: kernels.gla.gla, on q, k and log_g [B, T, H, K] and v [B, T, H, V].
      dtype: of activations; the gates are float32.
    """

    heads: int
    reverse: bool
    gla: GlaFn
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        dv = width // self.heads
        dk = dv // 2
        column = ("embed", "heads", None)
        q = _projection((self.heads, dk), column, self.dtype, "q")(x)
        k = _projection((self.heads, dk), column, self.dtype, "k")(x)
        v = _projection((self.heads, dv), column, self.dtype, "v")(x)
        r = _projection((self.heads, dv), column, self.dtype, "r")(x)
        low = _projection(_GATE_RANK, ("embed", None), self.dtype, "gate_down")(x)
        gate = dense((self.heads, dk), _gla_init, (None, "heads", None), ("heads", None), self.dtype, "gate_up")(low)
        out = checkpoint_name(self.gla(q, k, v, _log_gate(gate), reverse=self.reverse), MIXED)
        out = _swish_times(r, RMSNorm(name="out_norm")(out))
        return _projection(width, ("heads", None, "embed"), self.dtype, "out", axis=(-2, -1))(out)


@layers.recomputed
def _shifted_products(x, kernel, bias):
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    return sum(kernel[i, j] * padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) + bias


class DepthwiseConv(nn.Module):
    """3x3 over the grid, zero-padded, one filter a channel: [B, T, D] -> [B, T, D].

    As nine shifted products, which fuse into one pass over memory; XLA's grouped convolution is far slower on CPUs.
    """

    grid: tuple[int, int]
    start: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        (h, w), width = self.grid, x.shape[-1]

        def identity(key, shape, dtype):
            del key
            return jnp.zeros(shape, dtype).at[1, 1].set(1)

        # torch's default for a convolution with a fan-in of 9: uniform within 1/3.
        random = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2, batch_axis=())
        init = {"identity": identity, "random": random}[self.start]
        kernel = self.param("kernel", nn.with_logical_partitioning(init, (None, None, None)), (3, 3, width), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(layers.zeros, (None,)), (width,), jnp.float32)
        return _shifted_products(x.reshape(-1, h, w, width), kernel, bias).reshape(x.shape)


class DiGBlock(nn.Module):
    """One block: tokens x [B, T, D] in raster order and conditioning -> (x [B, T, D], None), the pair that nn.scan wants.

    The conditioning is c, as layers.block_adaln takes it, and with text its tokens [B, L, D] and lengths [B].

    Attributes:
      heads: H.
      grid: rows and columns of tokens, T = rows * columns.
      order: (columns first?, reversed?) of the block's scan.
      norm, convolution: one of layers.NORMS and of CONVOLUTIONS.
      gla: kernels.gla.gla.
      cross_attention: to the text's tokens.
      remat_part: how the mixer, the cross-attention and the SwiGLU are computed again in the backward pass.
      constrain: the activations' sharding.
      dtype: of activations.
      cell: of a route: the block sees one token of each cell of this size, which make a coarser grid for its scan. Its
        convolution acts on the whole grid, so that it reaches as far as it does without a route.
    """

    heads: int
    grid: tuple[int, int]
    order: tuple[bool, bool]
    norm: str
    convolution: str
    gla: GlaFn
    cross_attention: CrossAttentionFn
    remat_part: RematPart
    constrain: layers.Constrain
    dtype: jnp.dtype
    cell: Cell = (1, 1)

    @nn.compact
    def __call__(self, x, c, *text, among: Among | None = None):
        """among: of the route, where these are not all tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.block_adaln(self, c)
        # Of two parts that wait together, the mixer is the cheaper one to compute again.
        x = self.remat_part(DiGBlock._mix, save_products=False)(self, x, shift1, scale1, gate1)
        if text:
            x = self.remat_part(DiGBlock._cross, save_products=True)(self, x, *text)
        x = self.remat_part(DiGBlock._mlp, save_products=True)(self, x, shift2, scale2, gate2)
        if self.convolution != "none":
            x = self._convolved(x, among)
        return self.constrain(x, ACTIVATIONS), None

    def _convolved(self, x, among):
        """x [B, T or fewer, D] -> the same, of the convolution over all tokens."""
        convolution = DepthwiseConv(self.grid, self.convolution, self.dtype, name="conv")
        if among is None:
            return convolution(x)
        route = Route(among.order, among.inverse, x.shape[1])
        return taken(convolution(taken_back(x, among.skipping, route)), route)[0]

    def _mix(self, x, shift, scale, gate):
        """x [B, T, D], shift, scale and gate [B, D] -> [B, T, D]."""
        columns, reverse = self.order
        grid = tuple(side // part for side, part in zip(self.grid, self.cell, strict=True))
        y = layers.modulated_norm(self.norm, "norm1", x, shift, scale)
        y = _transpose_grid(y, grid) if columns else y
        y = GatedLinearAttention(self.heads, reverse, self.gla, self.dtype, name="attention")(y)
        y = _transpose_grid(y, grid[::-1]) if columns else y
        return x + gate[:, None] * y

    def _cross(self, x, text, length):
        """x [B, T, D], text [B, L, D], length [B] -> [B, T, D]."""
        return x + CrossAttention(self.heads, self.cross_attention, self.dtype, name="cross")(x, text, length)

    def _mlp(self, x, shift, scale, gate):
        """x [B, T, D], shift, scale and gate [B, D] -> [B, T, D]."""
        y = layers.modulated_norm(self.norm, "norm2", x, shift, scale)
        hidden = -(-int(8 * x.shape[-1] / 3) // 256) * 256  # 8D/3, rounded up to a multiple of 256
        return x + gate[:, None] * SwiGLU(hidden, False, self.dtype, name="mlp")(y)


def _transpose_grid(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens of a grid in raster order -> column by column: [B, T, D] -> [B, T, D]."""
    return x.reshape(-1, *grid, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
