"""Softmax attention over [B, T, H, K]: plain XLA, in chunks of queries, cuDNN on NVIDIA GPUs, a Pallas flash kernel on TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from speedit_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn", "pallas")
_QUERY_CHUNK = 256  # logits of 256 T H numbers at a time
_CUDNN_WIDEST, _HOPPER_WIDEST = 128, 256  # heads of cuDNN's attention, on older GPUs and on those from Hopper on
_LANES = 128  # of a TPU: the flash kernel's heads are no wider, or whole multiples
# Blocks of the TPU kernel -> cycles of a block's pair of tokens, forward and backward, relative to the largest block's
# (v5e, by benchmarks/tpu_bundles.py). Tokens are padded to whole blocks.
FLASH_BLOCKS = {512: 1.0, 256: 1.73, 128: 2.99}


def choose_attention(requested: str, platform: str, dtype, head_width: int) -> str:
    """Resolves "auto": cudnn on GPU in half precision, pallas on TPU, else xla, also for heads that these do not have.

    Raises:
      UserError: unknown, or one that this platform, dtype or width of a head does not have.
    """
    dtype = jnp.dtype(dtype)
    half = dtype in (jnp.bfloat16, jnp.float16)
    in_lanes = head_width <= _LANES or head_width % _LANES == 0
    if requested not in IMPLEMENTATIONS:
        raise UserError(f"unknown model.attention {requested!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "auto":
        if platform == "tpu":
            return "pallas" if in_lanes else "xla"
        for_cudnn = half and head_width % 8 == 0 and head_width <= _CUDNN_WIDEST
        return "cudnn" if platform in ("gpu", "cuda") and for_cudnn else "xla"
    if requested == "cudnn" and (platform not in ("gpu", "cuda") or not half):
        raise UserError(
            f"model.attention=cudnn needs an NVIDIA GPU and bfloat16 activations, not {platform} in {dtype.name}; use auto or xla"
        )
    if requested == "cudnn" and (head_width % 8 or head_width > _HOPPER_WIDEST):
        raise UserError(
            f"model.attention=cudnn wants heads whose width is a multiple of 8 up to {_HOPPER_WIDEST}, not {head_width};"
            " use auto or xla"
        )
    if requested == "pallas" and platform != "tpu":
        raise UserError(f"model.attention=pallas needs a TPU, not {platform}; use auto or xla")
    if requested == "pallas" and not in_lanes:
        raise UserError(
            f"model.attention=pallas wants heads whose width is up to {_LANES}, or a multiple of it, not {head_width};"
            " use auto or xla"
        )
    return requested


def attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str, batch_axes, head_axis) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, statistics in float32.

    Args:
      q, k, v: [B, T, H, K].
      implementation: "xla", "chunked", "cudnn" or "pallas", as `choose_attention` returned it.
      batch_axes, head_axis: mesh axes that B and H are sharded over, for the kernel, which XLA cannot partition.

    Returns:
      [B, T, H, K].
    """
    if implementation == "xla":
        return softmax_attention(q, k, v)
    if implementation == "chunked":
        return chunked_attention(q, k, v)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    spec = P(batch_axes, None, head_axis, None)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _tpu_flash(q, k, v)
    return jax.shard_map(_tpu_flash, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


@jax.custom_jvp
def _softmax(logits: jax.Array) -> jax.Array:
    """Over the last axis. The gradient needs only the result; jax.nn.softmax's own keeps the exponentials beside it."""
    return jax.nn.softmax(logits)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    out = _softmax(*primals)
    weighted = out * tangents[0]
    return out, weighted - out * weighted.sum(axis=-1, keepdims=True)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array | None = None) -> jax.Array:
    """`attention` by its formula. It saves less for the backward pass than jax.nn's, and follows float64 inputs.

    Args:
      q: [B, T, H, K].
      k, v: [B, S, H, K].
      length: int [B] of 1 to S: the keys that are there, the others are padding; None is all of them.
    """
    statistics = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=statistics) * q.shape[-1] ** -0.5
    if length is not None:
        there = jnp.arange(k.shape[1]) < length[:, None]
        logits = jnp.where(there[:, None, None], logits, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", _softmax(logits).astype(v.dtype), v)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array | None = None) -> jax.Array:
    """The same as `softmax_attention`, in memory linear in T.

    It computes one chunk of queries after the other, and each again in the backward pass.
    """
    tokens = q.shape[1]
    chunk = min(_QUERY_CHUNK, tokens)
    # [B, T, H, K] -> [N, B, chunk, H, K]; the queries that fill the last chunk are dropped.
    chunks = jnp.pad(q, ((0, 0), (0, -tokens % chunk), (0, 0), (0, 0)))
    chunks = chunks.reshape(q.shape[0], -1, chunk, *q.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda queries: softmax_attention(queries, k, v, length)), chunks)
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :tokens]


def _tpu_flash(q, k, v):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    tokens = q.shape[1]
    block = flash_block(tokens)
    pad = -tokens % block
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
    segments = None
    if pad:
        # Padding is a segment of its own, so that no real token attends to it.
        ids = jnp.broadcast_to((jnp.arange(tokens + pad) >= tokens).astype(jnp.int32), (q.shape[0], tokens + pad))
        segments = flash.SegmentIds(ids, ids)
    out = flash.flash_attention(q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=_block_sizes(block))
    return out[:, :, :tokens].swapaxes(1, 2)


def flash_block(tokens: int) -> int:
    """The block that costs least, padding included."""
    return min(FLASH_BLOCKS, key=lambda b: (tokens + -tokens % b) ** 2 * FLASH_BLOCKS[b])


@functools.cache
def _block_sizes(b: int):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    return flash.BlockSizes(
        block_q=b,
        block_k_major=b,
        block_k=b,
        block_b=1,
        block_q_major_dkv=b,
        block_k_major_dkv=b,
        block_k_dkv=b,
        block_q_dkv=b,
        block_k_major_dq=b,
        block_k_dq=b,
        block_q_dq=b,
    )
