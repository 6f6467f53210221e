"""The heads through which a hidden state of the network is compared with what it is aligned with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models.build import Model, activations_dtype
from speedit_jax.models.layers import dense, xavier

HIDDEN = 2048  # REPA's, whatever D and F are


class Head(nn.Module):
    """[B, T, D] -> [B, T, D]: linear to 2 D, SiLU, linear (SRA, arXiv 2505.02831)."""

    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = dense(2 * width, xavier, ("embed", "mlp"), ("mlp",), self.dtype, "hidden")(x)
        return dense(width, xavier, ("mlp", "embed"), (None,), self.dtype, "out")(nn.silu(hidden))


class Mlp(nn.Module):
    """[B, T, D] -> [B, T, F]: three linear layers with SiLU between them (REPA, arXiv 2410.06940)."""

    features: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x):
        x = nn.silu(dense(HIDDEN, xavier, ("embed", "mlp"), ("mlp",), self.dtype, "hidden")(x))
        x = nn.silu(dense(HIDDEN, xavier, ("mlp", "embed"), (None,), self.dtype, "middle")(x))
        return dense(self.features, xavier, ("embed", None), (None,), self.dtype, "out")(x)


class Convolution(nn.Module):
    """[B, T, D] -> [B, T, F]: 3x3 over the grid of tokens, zeros around it (iREPA, arXiv 2512.10794)."""

    features: int
    grid: tuple[int, int]
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x):
        convolution = nn.Conv(
            self.features,
            (3, 3),
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(xavier, (None, None, "embed", None)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,)),
            name="convolution",
        )
        return convolution(x.reshape(len(x), *self.grid, -1)).reshape(*x.shape[:2], self.features)


HEADS = ("mlp", "conv")


@dataclasses.dataclass(frozen=True)
class Projector:
    """The head as pure functions. It belongs to training alone: samplers, averages and exports do not have it.

    Attributes:
      init: key -> parameters, a nested dict of float32 arrays.
      apply: (parameters, hidden state [B, T, D]) -> [B, T, D or F].
      axes: like the parameters, with a tuple of logical axis names for each.
      forward_flops: of one token.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    axes: Any
    forward_flops: int


def make_projector(model: Model, head: str = "", features: int = 0) -> Projector:
    """
    Args:
      head: of HEADS, to states of width `features`; "" is SRA's, to those of the network's own width.
    """
    dtype, width = activations_dtype(model.dtype), model.width
    if head == "conv":
        network, forward_flops = Convolution(features, model.grid, dtype), 18 * width * features
    elif head == "mlp":
        network, forward_flops = Mlp(features, dtype), 2 * HIDDEN * (width + HIDDEN + features)
    else:
        network, forward_flops = Head(dtype), 8 * width**2

    def boxed_init(key):
        return network.init(key, jnp.zeros((1, model.tokens, width)))["params"]

    boxes = jax.eval_shape(boxed_init, jax.random.key(0))
    return Projector(
        init=lambda key: nn.meta.unbox(boxed_init(key)),
        apply=lambda params, hidden: network.apply({"params": params}, hidden),
        axes=jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)),
        forward_flops=forward_flops,
    )
