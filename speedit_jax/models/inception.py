"""Inception-v3 as FID knows it: the network of TensorFlow's 2015-12-05 archive, NHWC, for evaluation only.

It is not torchvision's: it has 1008 logits, its average pools leave the padding out, its last block pools by maximum, and images
are resized as TensorFlow 1 did. Modules bear the names of the PyTorch port, so that interop/inception.py needs no table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.interop import inception as files

SIZE = 299  # pixels of the network's input
_EPSILON = 1e-3  # of the batch norms
_SPATIAL_CHANNELS = 7  # as ADM: 17 * 17 * 7 features, about as many as the pooled ones
OUTPUTS = {"pool": 2048, "spatial": 17 * 17 * _SPATIAL_CHANNELS, "logits": 1008}


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Bilinear, [B, H, W, C] -> [B, size, size, C], as tf.image.resize_bilinear of TensorFlow 1 without align_corners.

    Output pixel i samples the input at i * H / size: not at pixels' centres, as later libraries do, and without antialiasing when
    shrinking. ADM's evaluator and torch-fidelity do this; pytorch-fid samples at the centres.
    """
    for axis in (1, 2):
        n = images.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(n / size)
        low = np.minimum(at.astype(np.int32), n - 1)
        fraction = jnp.expand_dims(at - low, [a for a in range(images.ndim) if a != axis])
        below, above = (jnp.take(images, i, axis=axis) for i in (low, np.minimum(low + 1, n - 1)))
        images = below + (above - below) * fraction
    return images


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, its frozen batch norm and a ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Norm(nn.Module):
    """Batch norm with stored statistics: [B, H, W, D] -> [B, H, W, D]."""

    @nn.compact
    def __call__(self, x):
        shape, ones, zeros = x.shape[-1:], nn.initializers.ones, nn.initializers.zeros
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias


class Convolution(nn.Module):
    """[B, H, W, D] -> [B, H', W', width]."""

    layer: Layer

    @nn.compact
    def __call__(self, x):
        layer = self.layer
        padding = [(k // 2, k // 2) if layer.padded else (0, 0) for k in layer.kernel]
        x = nn.Conv(layer.width, layer.kernel, layer.stride, padding, use_bias=False, name="conv")(x)
        return nn.relu(Norm(name="bn")(x))


class Mixed(nn.Module):
    """[B, H, W, D] -> [B, H', W', D']: the channels of parallel branches, then those of the pooled input.

    Attributes:
      branches: of layers, applied one after another; where the last is a tuple, its layers are applied in parallel.
      pool: "average" or "max" of 3 x 3 before a 1x1 layer of `pool_width`; "halve" is a maximum with a stride of 2 alone.
    """

    branches: tuple[tuple[Layer | tuple[Layer, ...], ...], ...]
    pool: str
    pool_width: int = 0

    @nn.compact
    def __call__(self, x):
        outputs = []
        for *layers, last in self.branches:
            h = x
            for layer in layers:
                h = Convolution(layer, name=layer.name)(h)
            outputs += [Convolution(layer, name=layer.name)(h) for layer in (last if isinstance(last, tuple) else (last,))]
        if self.pool == "halve":
            return jnp.concatenate([*outputs, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)
        if self.pool == "max":
            pooled = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            pooled = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        return jnp.concatenate(
            [*outputs, Convolution(Layer("branch_pool", self.pool_width), name="branch_pool")(pooled)], axis=-1
        )


def _narrow(pool_width: int) -> dict[str, Any]:
    """5b to 5d, 35 x 35 positions."""
    fives = (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5)))
    threes = (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3)))
    return {"branches": ((Layer("branch1x1", 64),), fives, threes), "pool": "average", "pool_width": pool_width}


def _sevens(width: int) -> dict[str, Any]:
    """6b to 6e, 17 x 17 positions."""
    once = (Layer("branch7x7_1", width), Layer("branch7x7_2", width, (1, 7)), Layer("branch7x7_3", 192, (7, 1)))
    kernels = ((1, 1), (7, 1), (1, 7), (7, 1), (1, 7))
    widths = (width, width, width, width, 192)
    twice = tuple(Layer(f"branch7x7dbl_{i + 1}", *layer) for i, layer in enumerate(zip(widths, kernels, strict=True)))
    return {"branches": ((Layer("branch1x1", 192),), once, twice), "pool": "average", "pool_width": 192}


def _wide(pool: str) -> dict[str, Any]:
    """7b and 7c, 8 x 8 positions."""
    once = (Layer("branch3x3_1", 384), _fork("branch3x3_2"))
    twice = (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)), _fork("branch3x3dbl_3"))
    return {"branches": ((Layer("branch1x1", 320),), once, twice), "pool": pool, "pool_width": 192}


def _fork(name: str) -> tuple[Layer, Layer]:
    return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))


_HALVE_6A = (
    (Layer("branch3x3", 384, (3, 3), 2, False),),
    (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3), 2, False)),
)
_HALVE_7A = (
    (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2, False)),
    (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, (3, 3), 2, False),
    ),
)
_STEM = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), 2, False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    None,  # a maximum of 3 x 3 with a stride of 2
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    None,
)
BLOCKS: dict[str, dict[str, Any]] = {
    "Mixed_5b": _narrow(32),
    "Mixed_5c": _narrow(64),
    "Mixed_5d": _narrow(64),
    "Mixed_6a": {"branches": _HALVE_6A, "pool": "halve"},
    "Mixed_6b": _sevens(128),
    "Mixed_6c": _sevens(160),
    "Mixed_6d": _sevens(160),
    "Mixed_6e": _sevens(192),
    "Mixed_7a": {"branches": _HALVE_7A, "pool": "halve"},
    "Mixed_7b": _wide("average"),
    "Mixed_7c": _wide("max"),
}


class InceptionV3(nn.Module):
    """Images [B, H, W, 3], 0 to 255, to {"pool": [B, 2048], "spatial": [B, 2023], "logits": [B, 1008]}, float32.

    `pool` is for FID, KID, precision and recall. `spatial` is for sFID: the first 7 channels of Mixed_6d's 1x1 branch (in
    TensorFlow's graph mixed_6/conv), as ADM has it. `logits` are for the Inception Score, and without the bias, as in all
    published scores.
    """

    @nn.compact
    def __call__(self, images):
        x = (resize(images.astype(jnp.float32)) - 128) / 128
        for layer in _STEM:
            x = Convolution(layer, name=layer.name)(x) if layer else nn.max_pool(x, (3, 3), (2, 2))
        for name, block in BLOCKS.items():
            x = Mixed(**block, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = x.mean(axis=(1, 2))
        return {"pool": pool, "spatial": spatial, "logits": nn.Dense(OUTPUTS["logits"], use_bias=False, name="fc")(pool)}


def load_inception(where: str | None) -> tuple[Callable[[Any, jax.Array], dict[str, jax.Array]], Any]:
    """((parameters, images [B, H, W, 1 or 3] uint8) -> features, parameters as NumPy arrays) of a weight file.

    Raises:
      UserError: see interop/inception.py.
    """
    network, state = InceptionV3(), files.read_inception(where)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]

    def features(params, images):
        # Grey becomes three equal channels; accelerators round float32 products unless told otherwise.
        images = jnp.broadcast_to(images, (*images.shape[:3], 3))
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, images)

    return features, files.arrange(state, shapes, where)
