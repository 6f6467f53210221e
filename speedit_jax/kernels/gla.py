"""Gated linear attention: the public entry (arXiv 2312.06635; the equations are in docs/gla.md)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from speedit_jax.errors import UserError
from speedit_jax.kernels import chunked, pallas_gpu, pallas_tpu, reference

# name -> (q, k, v, log_g, *, scale, reverse) -> o
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.gla,
    "xla": chunked.gla,
    "pallas_tpu": pallas_tpu.gla,
    "pallas_gpu": pallas_gpu.gla,
}
# Tokens below which softmax attention is as fast on some platform: measured on CPUs, the published figure on GPUs.
GLA_PAYS_FROM = 1024
_PLATFORMS = {"pallas_tpu": ("tpu",), "pallas_gpu": ("gpu", "cuda")}


def choose_gla(requested: str, platform: str) -> str:
    """Resolves "auto": pallas_tpu on TPU, pallas_gpu on GPU, else xla.

    Raises:
      UserError: unknown, or one that this platform does not have.
    """
    if requested == "auto":
        return next((name for name, platforms in _PLATFORMS.items() if platform in platforms), "xla")
    if requested not in IMPLEMENTATIONS:
        raise UserError(f"unknown model.gla {requested!r}; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    if platform not in _PLATFORMS.get(requested, (platform,)):
        raise UserError(f"model.gla={requested} needs a {_PLATFORMS[requested][0]}, not {platform}; use auto or xla")
    return requested


def gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    *,
    scale: float | None = None,
    reverse: bool = False,
    implementation: str | None = None,
    batch_axes: Any = None,
    head_axis: str | None = None,
    check_gates: bool = False,
) -> jax.Array:
    """S_t = diag(exp(log_g_t)) S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t, causal over T, differentiable in all four inputs.

    Args:
      q, k: [B, T, H, K] float32 or bfloat16.
      v: [B, T, H, V], q's dtype.
      log_g: [B, T, H, K] float32, the forget gate in log space, <= 0: the state is multiplied by exp(log_g). Positive
        gates grow the state without bound, minus infinity gives NaN (-1e4 resets the state, too); neither is checked unless
        `check_gates`.
      scale: of the queries; K**-0.5 by default.
      reverse: run from the last token to the first: o_t then sees the tokens s >= t.
      implementation: "reference" (the token recurrence: the definition, and the fastest forward pass on CPUs), "xla" (chunked:
        runs everywhere), "pallas_tpu", "pallas_gpu" or None, which chooses for the default backend.
      batch_axes, head_axis: mesh axes that B and H are sharded over, or None. Under `jax.set_mesh` the op runs in a
        shard_map of its own over them: batch elements and heads do not meet, so nothing is communicated.
      check_gates: raise on a gate that is positive or not finite, at run time, on the host: for debugging, it synchronises.

    Returns:
      [B, T, H, V] in v's dtype. The state, the gates and all sums are float32.

    Raises:
      ValueError: shapes that do not fit, or heads or a batch that the mesh axes do not divide.
      TypeError: dtypes other than these.
    """
    _check(q, k, v, log_g)
    if implementation is None:
        implementation = choose_gla("auto", jax.default_backend())
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown gla implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if check_gates:
        jax.debug.callback(_raise_unless_gates, log_g.min(), log_g.max())
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    op = functools.partial(IMPLEMENTATIONS[implementation], scale=scale, reverse=reverse)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (batch_axes is None and head_axis is None):
        return op(q, k, v, log_g)
    _check_divides(mesh, q.shape[0], "batch elements", batch_axes)
    _check_divides(mesh, q.shape[2], "heads", head_axis)
    spec = P(batch_axes, None, head_axis, None)
    # The op's custom_vjp stays inside: crossing the boundary would cost an all-reduce of unmapped inputs.
    return jax.shard_map(op, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)(q, k, v, log_g)


def _check(q, k, v, log_g):
    if q.ndim != 4 or k.shape != q.shape or log_g.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "gla wants q, k, log_g [B, T, H, K] and v [B, T, H, V], not"
            f" q {q.shape}, k {k.shape}, v {v.shape}, log_g {log_g.shape}"
        )
    dtypes = (jnp.bfloat16, jnp.float32, jnp.float64)
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"gla wants q, k and v all float32 or all bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if log_g.dtype != jnp.promote_types(q.dtype, jnp.float32):
        # In bfloat16 a gate of exp(-1/256) would round to 1 and its decay vanish.
        raise TypeError(f"gla wants log_g in float32, not {log_g.dtype}")


def _check_divides(mesh, size: int, what: str, axes) -> None:
    ways = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        ways *= mesh.shape[axis]
    if size % ways:
        raise ValueError(f"mesh axis {axes!r} of size {ways} does not divide the {size} {what}")


def _raise_unless_gates(least, largest) -> None:
    if not -math.inf < least <= largest <= 0:
        raise ValueError(f"gla: log_g is from {least} to {largest}, but gates must be <= 0 and finite")
