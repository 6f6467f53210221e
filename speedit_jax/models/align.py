"""The head through which a hidden state of the student is compared with the teacher's (SRA, arXiv 2505.02831)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.models.build import Model, activations_dtype
from speedit_jax.models.layers import dense, xavier


class Head(nn.Module):
    """[B, T, D] -> [B, T, D]: linear to 2 D, SiLU, linear."""

    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = dense(2 * width, xavier, ("embed", "mlp"), ("mlp",), self.dtype, "hidden")(x)
        return dense(width, xavier, ("mlp", "embed"), (None,), self.dtype, "out")(nn.silu(hidden))


@dataclasses.dataclass(frozen=True)
class Projector:
    """The head as pure functions. It belongs to training alone: samplers, averages and exports do not have it.

    Attributes:
      init: key -> parameters, a nested dict of float32 arrays.
      apply: (parameters, hidden state [B, T, D]) -> [B, T, D].
      axes: like the parameters, with a tuple of logical axis names for each.
      forward_flops: of one token.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    axes: Any
    forward_flops: int


def make_projector(model: Model) -> Projector:
    head = Head(activations_dtype(model.dtype))

    def boxed_init(key):
        return head.init(key, jnp.zeros((1, 1, model.width)))["params"]

    boxes = jax.eval_shape(boxed_init, jax.random.key(0))
    return Projector(
        init=lambda key: nn.meta.unbox(boxed_init(key)),
        apply=lambda params, hidden: head.apply({"params": params}, hidden),
        axes=jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)),
        forward_flops=8 * model.width**2,
    )
