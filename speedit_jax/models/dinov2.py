"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), a vision transformer whose features others are aligned with.

Modules are named so that interop/dinov2.py needs no table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop import dinov2 as files

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Under transformers' names; defaults, which a config.json may leave out, are transformers'."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Dinov2Config":
        """Raises a UserError where a transformers config is that of another network."""
        found = cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})
        if found.hidden_act != "gelu" or found.num_channels != 3:
            raise UserError(
                f"config.json: hidden_act={found.hidden_act}, num_channels={found.num_channels}; DINOv2 has gelu and 3"
            )
        return found


def bicubic(size: int, out: int) -> np.ndarray:
    """[out, size] float64: what resamples an axis as torch.nn.functional.interpolate with mode="bicubic".

    That is Keys' kernel with a = -0.75, without antialiasing; at the border the last pixel goes on.
    """
    places = (np.arange(out) + 0.5) * size / out - 0.5
    first = np.floor(places).astype(int) - 1
    distance = np.abs(places[:, None] - (first[:, None] + np.arange(4)))
    a, near, far = -0.75, distance**3 - distance**2, distance**3 - 5 * distance**2 + 8 * distance - 4
    weights = np.where(distance <= 1, (a + 2) * near - distance**2 + 1, a * far)
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(first[:, None] + np.arange(4), 0, size - 1)), weights)
    return matrix


def resized(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[n, H, W, C] -> [n, *size, C] by `bicubic`."""
    rows, columns = (jnp.asarray(bicubic(*sides), images.dtype) for sides in zip(images.shape[1:3], size, strict=True))
    return jnp.einsum("hH,wW,nHWc->nhwc", rows, columns, images, precision=_HIGHEST)


def positions(table: jax.Array, grid: tuple[int, int], antialias: bool) -> jax.Array:
    """A table of positions [1, S, S, D] for another grid: [1, *grid, D]; itself where the grid is its own.

    Args:
      antialias: as REPA's code, by timm; else as transformers.
    """
    if table.shape[1:3] == grid:
        return table
    return jax.image.resize(table, (1, *grid, table.shape[3]), "cubic") if antialias else resized(table, grid)


class _Layer(nn.Module):
    """x [n, L, D] -> [n, L, D], pre-LN; what each half adds is scaled by channel."""

    config: Dinov2Config
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x):
        config, width = self.config, self.config.hidden_size

        def dense(features, name, bias=True):
            return nn.Dense(features, bias, dtype=self.dtype, precision=_HIGHEST, name=name)

        def norm(name):
            return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)

        def scale(name):
            return self.param(f"{name}.lambda1", nn.initializers.ones_init(), (width,))

        heads = (*x.shape[:2], config.num_attention_heads, width // config.num_attention_heads)
        y = norm("norm1")(x)
        q, k, v = (
            dense(width, f"attention.attention.{part}", config.qkv_bias)(y).reshape(heads) for part in ("query", "key", "value")
        )
        logits = jnp.einsum("nqhk,nvhk->nhqv", q, k, precision=_HIGHEST).astype(x.dtype) * heads[-1] ** -0.5
        mixed = jnp.einsum("nhqv,nvhk->nqhk", nn.softmax(logits).astype(v.dtype), v, precision=_HIGHEST).reshape(x.shape)
        x = x + dense(width, "attention.output.dense")(mixed) * scale("layer_scale1")
        y, hidden = norm("norm2")(x), int(width * config.mlp_ratio)
        if config.use_swiglu_ffn:
            hidden = -(-int(hidden * 2 / 3) // 8) * 8
            a, b = jnp.split(dense(2 * hidden, "mlp.weights_in")(y), 2, axis=-1)
            y = dense(width, "mlp.weights_out")(nn.silu(a) * b)
        else:
            y = dense(width, "mlp.fc2")(nn.gelu(dense(hidden, "mlp.fc1")(y), approximate=False))
        return x + y * scale("layer_scale2")


class _Network(nn.Module):
    """Normalised images [n, H, W, 3] -> [n, H / P, W / P, D]: the states of the patches after the last norm."""

    config: Dinov2Config
    dtype: jnp.dtype | None
    antialias: bool

    @nn.compact
    def __call__(self, images):
        config, width = self.config, self.config.hidden_size
        patch, side = (config.patch_size,) * 2, config.image_size // config.patch_size
        embed = nn.Conv(width, patch, patch, "VALID", precision=_HIGHEST, name="embeddings.patch_embeddings.projection")
        x = embed(images)
        grid = x.shape[1:3]
        first = self.param("embeddings.cls_token", nn.initializers.normal(), (1, 1, width))
        places = self.param("embeddings.position_embeddings", nn.initializers.normal(), (1, side**2 + 1, width))
        of_patches = positions(places[:, 1:].reshape(1, side, side, width), grid, self.antialias)
        x = (x + of_patches).reshape(len(x), -1, width)
        x = jnp.concatenate([jnp.broadcast_to(first + places[:, :1], (len(x), 1, width)), x], axis=1)
        for i in range(config.num_hidden_layers):
            x = _Layer(config, self.dtype, name=f"encoder.layer.{i}")(x)
        x = nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name="layernorm")(x)
        return x[:, 1:].reshape(len(x), *grid, width)


@dataclasses.dataclass(frozen=True)
class Dinov2:
    """The network as pure functions.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, normalised images [n, H, W, 3], sides multiples of the patch) -> [n, H / P, W / P, D].
    """

    config: Dinov2Config
    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def build_dinov2(config: Dinov2Config, dtype: jnp.dtype | None = None, antialias: bool = False) -> Dinov2:
    """
    Args:
      dtype: of the inputs of linear layers; None is the parameters' own.
      antialias: as in `positions`.
    """
    network = _Network(config, dtype, antialias)
    like = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    return Dinov2(
        config,
        init=lambda key: network.init(key, like)["params"],
        apply=lambda params, images: network.apply({"params": params}, images),
    )


def load_dinov2(directory: Path, dtype: jnp.dtype | None = None, antialias: bool = False) -> tuple[Dinov2, Any]:
    """The network in a directory of transformers, as `build_dinov2` has it, and its parameters, NumPy arrays.

    Raises:
      UserError: it is of another kind, or its weights do not fit its config.
    """
    dinov2 = build_dinov2(Dinov2Config.of(files.read_config(directory)), dtype, antialias)
    return dinov2, files.read_params(directory, jax.eval_shape(dinov2.init, jax.random.key(0)))
