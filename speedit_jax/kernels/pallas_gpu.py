"""The chunked form of docs/gla.md as Pallas kernels for NVIDIA GPUs, through Triton.

A GPU wants many independent programs, so no kernel carries anything from chunk to chunk: the programs are (B H, chunks), and the
state passes over the chunks outside, in an associative scan (eq. 4 and 9):
  1. each chunk's own contribution to the state
  2. the scan                                          backward: 1 and 2 again, then the same two against the order of chunks
  3. each chunk's outputs, from the state before it    backward: each chunk's gradients, from the state and its gradient
Operands stay [B, T, H, K] and [B, T, H, V]: a program reads a chunk of one head where it lies. Only to whole chunks and to
powers of two, as Triton wants, are they padded. The 0/1 matrices that sum the gates are chunked.py's, given as operands.

The registers hold a program's matrices without spilling because the levels are a loop, dV has a kernel of its own, and the
features of K, which do not meet in the gradients of q, k and g once dP is known, are spread over programs. In the gradients'
kernel the order of reading matters, too. With eight warps instead of four each product would be computed twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from speedit_jax.kernels.chunked import masks
from speedit_jax.kernels.tiles import NN, NT, TN, dot, terms

CHUNK = 64
_LEAST = 16  # a side of a matrix that Triton multiplies; also the features of K that a program of the gradients has
_WARPS = 4


def _gate_sums(matrix, g, axes, dtype):
    """A 0/1 matrix times g."""
    return sum(dot(matrix, term, axes, jnp.bfloat16) for term in terms(g, dtype))


def _state_kernel(sums_ref, x_ref, y_ref, g_ref, out_ref):
    """(x e^{sums g})^T y: [K, V], what a chunk adds to the state, or to its gradient."""
    dtype = x_ref.dtype
    decay = jnp.exp(_gate_sums(sums_ref[...], g_ref[...], NN, dtype))
    out_ref[...] = dot(x_ref[...].astype(jnp.float32) * decay, y_ref[...], TN, dtype)


def _apart(reverse: bool) -> jax.Array:
    """[C, C]: >> level it is 1 where that level computes the attention of row to column, the pairs of chunked.masks."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    return jnp.where(rows < columns if reverse else rows > columns, rows ^ columns, 0)


def _scores(sums_ref, q, k, g, dtype, reverse):
    """P of eq. (3): [C, C]."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    diagonal = jnp.where(rows == columns, (q * k).sum(axis=1)[:, None], 0.0)

    def level(i, scores):
        decay = jnp.exp(_gate_sums(sums_ref[i], g, NN, dtype))
        return jnp.where(_apart(reverse) >> i == 1, dot(q * decay, k * decay, NT, dtype), scores)

    return jax.lax.fori_loop(0, sums_ref.shape[0], level, diagonal)


def _output_kernel(sums_ref, entry_ref, q_ref, k_ref, v_ref, g_ref, state_ref, out_ref, *, scale, reverse):
    dtype, g, v = q_ref.dtype, g_ref[...], v_ref[...]
    q, k = q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    scores = _scores(sums_ref, q, k, g, dtype, reverse)
    entry = jnp.exp(_gate_sums(entry_ref[...], g, NN, dtype))
    out = dot(q * entry, state_ref[...], NN, dtype) + dot(scores, v, NN, dtype)
    out_ref[...] = (scale * out).astype(out_ref.dtype)


def _values_kernel(sums_ref, exit_ref, q_ref, k_ref, g_ref, d_state_ref, d_out_ref, dv_ref, *, scale, reverse):
    """Eq. (6); d_out comes with the scale left out, d_state with it."""
    dtype, g = q_ref.dtype, g_ref[...]
    q, k = q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    scores = _scores(sums_ref, q, k, g, dtype, reverse)
    leave = jnp.exp(_gate_sums(exit_ref[...], g, NN, dtype))
    d_out = scale * d_out_ref[...].astype(jnp.float32)
    dv_ref[...] = (dot(scores, d_out, TN, dtype) + dot(k * leave, d_state_ref[...], NN, dtype)).astype(dv_ref.dtype)


def _gradient_kernel(
    sums_ref,
    entry_ref,
    exit_ref,
    v_ref,
    d_out_ref,
    q_ref,
    k_ref,
    g_ref,
    state_ref,
    d_state_ref,
    dq_ref,
    dk_ref,
    dg_ref,
    *,
    scale,
    reverse,
):
    """Eq. (7) and (8) of some features of K; d_out comes with the scale left out, d_state with it."""
    dtype, g, v = q_ref.dtype, g_ref[...], v_ref[...]
    q, k = q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    d_out = scale * d_out_ref[...].astype(jnp.float32)
    d_scores = dot(d_out, v, NT, dtype)
    diagonal = (d_out * v.astype(jnp.float32)).sum(axis=1)[:, None]
    entry, state = jnp.exp(_gate_sums(entry_ref[...], g, NN, dtype)), state_ref[...]
    dq_entry = dot(d_out, state, NT, dtype) * entry
    dg = _gate_sums(entry_ref[...], q * dq_entry, TN, dtype)
    leave, d_state = jnp.exp(_gate_sums(exit_ref[...], g, NN, dtype)), d_state_ref[...]
    dk_leave = dot(v, d_state, NT, dtype) * leave
    dg += _gate_sums(exit_ref[...], k * dk_leave, TN, dtype)
    dg += (jnp.exp(g.sum(axis=0)) * (state * d_state).sum(axis=1))[None, :]

    def level(i, grads):
        dq, dk, dg = grads
        decay = jnp.exp(_gate_sums(sums_ref[i], g, NN, dtype))
        d_level = jnp.where(_apart(reverse) >> i == 1, d_scores, 0.0)
        dq_level = dot(d_level, k * decay, NN, dtype) * decay
        dk_level = dot(d_level, q * decay, TN, dtype) * decay
        return dq + dq_level, dk + dk_level, dg + _gate_sums(sums_ref[i], q * dq_level + k * dk_level, TN, dtype)

    start = (dq_entry + diagonal * k, dk_leave + diagonal * q, dg)
    dq, dk, dg = jax.lax.fori_loop(0, sums_ref.shape[0], level, start)
    dq_ref[...] = dq.astype(dq_ref.dtype)
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dg_ref[...] = dg


def _call(kernel, constants, inputs, outputs, *, interpret, parts=1, whole=0):
    """Runs `kernel` over (B H, chunks, parts).

    Args:
      constants: arrays that every program sees whole.
      inputs: [B, T, H, D], of which a program sees one head's chunk [C, D], and the first is one, or [B H, N, K, V], of which it
        sees its chunk's [K, V].
      outputs: shapes likewise.
      parts: of D and K, of which a program sees one; of the first `whole` inputs it sees all.
    """
    _, tokens, heads, _ = inputs[0].shape

    def block(array, parts):
        _, n, k, d = array.shape
        if n == tokens:
            shape = (None, CHUNK, None, d // parts)
            return pl.BlockSpec(shape, lambda b, n, p: (b // heads, n, b % heads, p if parts > 1 else 0))
        return pl.BlockSpec((None, None, k // parts, d), lambda b, n, p: (b, n, p if parts > 1 else 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(inputs[0].shape[0] * heads, tokens // CHUNK, parts),
        in_specs=[pl.BlockSpec(c.shape, lambda b, n, p, rank=c.ndim: (0,) * rank) for c in constants]
        + [block(x, 1 if i < whole else parts) for i, x in enumerate(inputs)],
        out_specs=[block(x, parts) for x in outputs],
        out_shape=outputs,
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )(*constants, *inputs)


def _scan(whole: jax.Array, own: jax.Array, reverse: bool) -> jax.Array:
    """S before each chunk, S' = whole S + own: whole [B H, N, K], own [B H, N, K, V] -> [B H, N, K, V]."""

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, after = jax.lax.associative_scan(join, (whole[..., None], own), axis=1, reverse=reverse)
    pad = ((0, 0), (0, 1) if reverse else (1, 0), (0, 0), (0, 0))
    return jnp.pad(after, pad)[:, 1:] if reverse else jnp.pad(after, pad)[:, :-1]


def _constants(reverse: bool):
    """sums, entry and exit."""
    m = masks(CHUNK, reverse)
    return [jnp.asarray(x, jnp.bfloat16) for x in (m.sums, m.entry, m.exit)]


def _size(d: int) -> int:
    return max(_LEAST, 1 << (d - 1).bit_length())


def _pad(x: jax.Array) -> jax.Array:
    """[B, T, H, D], T to whole chunks and D to a power of two with zeros, which change nothing."""
    _, t, _, d = x.shape
    return jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0), (0, _size(d) - d)))


def _unpad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse."""
    return x[:, : shape[1], :, : shape[3]]


def _whole(g: jax.Array) -> jax.Array:
    """The decay over each chunk: [B, T, H, K] -> [B H, N, K]."""
    b, t, h, k = g.shape
    sums = g.reshape(b, t // CHUNK, CHUNK, h, k).sum(axis=2)
    return jnp.exp(sums.swapaxes(1, 2).reshape(b * h, -1, k))


def _own(sums, x, y, g, interpret):
    b, t, h, k = x.shape
    shape = jax.ShapeDtypeStruct((b * h, t // CHUNK, k, y.shape[3]), jnp.float32)
    return _call(_state_kernel, [sums], [x, y, g], [shape], interpret=interpret)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _gla(q, k, v, log_g, scale, reverse, interpret):
    sums, entry, leave = _constants(reverse)
    shape = v.shape
    q, k, v, g = (_pad(x) for x in (q, k, v, log_g))
    states = _scan(_whole(g), _own(leave, k, v, g, interpret), reverse)
    outputs = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    kernel = functools.partial(_output_kernel, scale=scale, reverse=reverse)
    (out,) = _call(kernel, [sums, entry], [q, k, v, g, states], outputs, interpret=interpret)
    return _unpad(out, shape)


def _gla_forward(q, k, v, log_g, scale, reverse, interpret):
    return _gla(q, k, v, log_g, scale, reverse, interpret), (q, k, v, log_g)


def _gla_backward(scale, reverse, interpret, saved, d_out):
    sums, entry, leave = _constants(reverse)
    q, k, v, g, d_out = (_pad(x) for x in (*saved, d_out))
    whole = _whole(g)
    states = _scan(whole, _own(leave, k, v, g, interpret), reverse)
    d_states = scale * _scan(whole, _own(entry, q, d_out, g, interpret), not reverse)
    (dv,) = _call(
        functools.partial(_values_kernel, scale=scale, reverse=reverse),
        [sums, leave],
        [q, k, g, d_states, d_out],
        [jax.ShapeDtypeStruct(v.shape, v.dtype)],
        interpret=interpret,
    )
    dq, dk, dg = _call(
        functools.partial(_gradient_kernel, scale=scale, reverse=reverse),
        [sums, entry, leave],
        [v, d_out, q, k, g, states, d_states],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, g)],
        interpret=interpret,
        parts=q.shape[3] // _LEAST,
        whole=2,
    )
    return tuple(_unpad(x, original.shape) for x, original in zip((dq, dk, dv, dg), saved, strict=True))


_gla.defvjp(_gla_forward, _gla_backward)


def gla(
    q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array, *, scale: float, reverse: bool, interpret: bool = False
) -> jax.Array:
    """Shapes and meaning as kernels.reference.gla; `interpret` runs the kernels on any device, for their values.

    Only the inputs are saved for the backward pass.

    Raises:
      TypeError: float64.
    """
    if q.dtype == np.float64:
        raise TypeError("gla implementation pallas_gpu wants float32 or bfloat16, not float64; use xla")
    return _gla(q, k, v, log_g, scale, reverse, interpret)
