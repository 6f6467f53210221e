"""Layers that the backbones share: embeddings, modulation, patches.

Parameter axes carry logical names; the rule table in sharding.py maps them to the mesh:
  embed   width D of a kernel that projects from or to the residual stream
  heads   attention heads         mlp     hidden width of the MLP
  layers  the scanned depth       None    never sharded
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# (array, logical names of its axes) -> the array, its sharding constrained
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

xavier = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

NORMS = ("layer", "rms")


def _rows_dot_general(x, kernel, dimension_numbers, **kwargs):
    """lax.dot_general for [B, T, ...] whose last axes are contracted, with batch and tokens as one axis of rows.

    So the gradient of the kernel is a plain product over the rows; over two axes XLA:CPU makes one by copying an operand first.
    """
    (contracted, rows_of_kernel), batch = dimension_numbers
    leading = x.shape[: contracted[0]]
    x = x.reshape(-1, *x.shape[contracted[0] :])
    contracted = tuple(range(1, x.ndim))
    out = jax.lax.dot_general(x, kernel, ((contracted, rows_of_kernel), batch), **kwargs)
    return out.reshape(*leading, *out.shape[1:])


def dense(features, kernel_init, kernel_axes, bias_axes, dtype, name, axis=-1) -> nn.DenseGeneral:
    """A linear layer with named kernel axes, without bias if `bias_axes` is None; parameters float32, arithmetic in `dtype`."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=bias_axes is not None,
        dtype=dtype,
        dot_general=_rows_dot_general,
        kernel_init=nn.with_logical_partitioning(kernel_init, kernel_axes),
        bias_init=nn.with_logical_partitioning(zeros, bias_axes),
        name=name,
    )


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Cheap arithmetic `f`, of which only the inputs are kept for the backward pass, which computes the rest again.

    JAX's rules would keep several arrays of it, some in float32. Stacked over the depth they cost more time to write, fill
    and read than the arithmetic does, and most of the memory of a layer.
    """
    # In a scan over the depth the forward and backward passes are two loops, between which nothing is shared.
    return jax.checkpoint(f, prevent_cse=False)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters, eps 1e-6, statistics in float32: [..., D]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


@recomputed
def _rms_norm(x, weight):
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + 1e-6) * weight).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, eps 1e-6, statistics in float32."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        return _rms_norm(x, self.param("weight", init, (x.shape[-1],), jnp.float32))


def adaln(c: jax.Array, count: int, dtype, name: str) -> list[jax.Array]:
    """`count` shifts, scales and gates, W SiLU(c) + b with W and b zero at first (adaLN-Zero): c [B, D] -> each [B, D]."""
    width = c.shape[-1]
    out = dense((count, width), zeros, ("embed", None, None), (None, None), dtype, name)(nn.silu(c))
    return [out[:, i] for i in range(count)]


def table_adaln(module: nn.Module, m: jax.Array, count: int, name: str) -> list[jax.Array]:
    """`count` shifts, scales and gates, m [B, count or 1, D] plus a table of the module's own: adaLN-single (PixArt-alpha)."""
    width = m.shape[-1]
    init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None, None))
    out = m + module.param(name, init, (count, width), jnp.float32).astype(m.dtype)
    return [out[:, i] for i in range(count)]


def block_adaln(block: nn.Module, c: jax.Array) -> list[jax.Array]:
    """The shifts, scales and gates of a block's two parts, each [B, D].

    Args:
      c: [B, D], to a linear layer of the block; or [B, 6, D], what all blocks share, to a table of the block.
    """
    return table_adaln(block, c, 6, "adaLN_table") if c.ndim == 3 else adaln(c, 6, block.dtype, "adaLN")


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: x [B, T, D], shift and scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


@recomputed
def modulated_layer_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`modulate` of `layer_norm`."""
    return modulate(layer_norm(x), shift, scale)


def modulated_norm(norm: str, name: str, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`modulate` of `norm`, one of NORMS: layer, without parameters, or rms, with a weight of that name."""
    if norm == "rms":
        return modulate(RMSNorm(name=name)(x), shift, scale)
    return modulated_layer_norm(x, shift, scale)


@recomputed
def _swiglu(ab):
    return nn.silu(ab[..., 0, :]) * ab[..., 1, :]


class SwiGLU(nn.Module):
    """(silu(a) * b) W with [a, b] = x W_ab: [B, T, D] -> [B, T, D].

    Attributes:
      hidden: width of a and of b.
      bias: whether both linear layers have one.
      dtype: of activations.
    """

    hidden: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        biases = ((None, "mlp"), (None,)) if self.bias else (None, None)
        ab = dense((2, self.hidden), xavier, ("embed", None, "mlp"), biases[0], self.dtype, "up")(x)
        return dense(x.shape[-1], xavier, ("mlp", "embed"), biases[1], self.dtype, "down")(_swiglu(ab))


def rope_angles(grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """Angles of 2-D rotary positions (arXiv 2104.09864): [T, head_dim / 2] float64, of tokens in raster order.

    The first half turns with the row, the second with the column, both by p w_j with w_j = 10000^(-2 j / (head_dim / 2)).
    """
    half = head_dim // 2
    frequencies = 10_000.0 ** -(np.arange(0, half, 2) / half)
    rows, columns = (place.reshape(-1, 1) for place in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    return np.concatenate([rows * frequencies, columns * frequencies], axis=1)


@recomputed
def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each pair of neighbouring channels by its angle.

    Args:
      x: [B, T, H, K].
      angles: [T, K / 2], or [B, T, K / 2].
    """
    statistics = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (f(angles.astype(statistics))[..., None, :] for f in (jnp.cos, jnp.sin))
    a, b = x[..., 0::2].astype(statistics), x[..., 1::2].astype(statistics)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 10_000.0, shift: int = 0) -> jax.Array:
    """[cos(t w), sin(t w)] with w_j = max_period^(-j / (dim/2 - shift)): [B] -> [B, dim].

    Without shift as in ADM and DiT; diffusers' DiT shifts by 1.
    """
    # float64 only where the user switched it on: float32 rounds the angle of t = 999 by 3e-5, as the published code does.
    dtype = jnp.result_type(float)
    frequencies = np.exp(-np.log(max_period) * np.arange(dim // 2) / (dim // 2 - shift))
    angles = t.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """t [B] -> [B, D]: sinusoid, linear, SiLU, linear."""

    width: int
    shift: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t):
        x = timestep_features(t, shift=self.shift).astype(self.dtype)
        x = dense(self.width, normal_002, (None, "embed"), (None,), self.dtype, "hidden")(x)
        return dense(self.width, normal_002, ("embed", None), (None,), self.dtype, "out")(nn.silu(x))


class LabelEmbedder(nn.Module):
    """y [B] int -> [B, D]: a table of num_classes rows, and one more for the null label where there is guidance."""

    rows: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y):
        init = nn.with_logical_partitioning(normal_002, (None, "embed"))
        table = self.param("table", init, (self.rows, self.width), jnp.float32)
        return jnp.take(table, y, axis=0).astype(self.dtype)


class TextEmbedder(nn.Module):
    """Text [..., E] -> [..., D]: linear, GELU (tanh), linear."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = dense(self.width, normal_002, ("embed", "mlp"), ("mlp",), self.dtype, "hidden")(x.astype(self.dtype))
        x = nn.gelu(x, approximate=True)
        return dense(self.width, normal_002, ("mlp", "embed"), (None,), self.dtype, "out")(x)


def sincos_position_table(height: int, width: int, dim: int, scale: float = 1.0) -> np.ndarray:
    """Frozen 2-D sine-cosine position embedding of MAE and DiT, for any grid: [height * width, dim] float64.

    The first half of the channels encodes the column, the second the row; each is [sin(p w), cos(p w)],
    w_j = 10000^(-j / (dim/4)). Positions are divided by `scale` first.
    """
    frequencies = 10_000.0 ** -(np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def encode(position):
        angles = position.reshape(-1, 1) / scale * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, T, P*P*C], row-major over patches and within a patch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """The inverse of `patchify`: [B, T, P*P*C] -> [B, H, W, C]."""
    b, (h, w) = x.shape[0], grid
    x = x.reshape(b, h, w, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)
