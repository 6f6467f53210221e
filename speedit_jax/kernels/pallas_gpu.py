"""The chunked form of docs/gla.md as Pallas kernels for NVIDIA GPUs, through Triton.

A GPU wants many independent programs, so the kernels that multiply matrices carry nothing from chunk to chunk: their programs are
(B H, chunks). A small kernel of its own passes the state over the chunks (eq. 4 and 9):
  1. each chunk's own contribution to the state        backward: the state's gradient by the same two, against the order of chunks
  2. the scan, one program for each row of each state
  3. each chunk's outputs, from the state before it    backward: each chunk's gradients, from the state and its gradient
Where the gates of a chunk and head are bounded, P is one product instead of one a level (`_bounded`).
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
_AHEAD = 16  # chunks whose contributions the scan reads before it needs the first of them
# Sums of |g| over a chunk up to which a single product computes P: half of it is the largest exponent of a factor. Then the
# largest entry, which the mask removes, is exp(60) = 1e26 times q k, and no factor under- or overflows. The exponents are
# differences of sums, so their error grows with the bound: in bfloat16 it stays far below the factors' rounding, in float32 it
# would be 30 roundings and more.
BOUND = {jnp.dtype(jnp.bfloat16): 60.0, jnp.dtype(jnp.float32): 16.0}


def _gate_sums(matrix, g, axes, dtype):
    """A 0/1 matrix times g."""
    return sum(dot(matrix, term, axes, jnp.bfloat16) for term in terms(g, dtype))


def _state_kernel(sums_ref, x_ref, y_ref, g_ref, own_ref, whole_ref):
    """(x e^{sums g})^T y: [K, V], what a chunk adds to the state, or to its gradient; and the decay over the chunk, [K]."""
    dtype, g = x_ref.dtype, g_ref[...]
    decay = jnp.exp(_gate_sums(sums_ref[...], g, NN, dtype))
    own_ref[...] = dot(x_ref[...].astype(jnp.float32) * decay, y_ref[...], TN, dtype)
    whole_ref[...] = jnp.exp(g.sum(axis=0))


def _scan_kernel(whole_ref, own_ref, state_ref, *, scale, reverse):
    """A row of the state before each chunk, S' = whole S + own: whole [N], own and state [N, V]."""
    chunks, width = own_ref.shape

    def steps(first, count, state):
        at = [chunks - 1 - (first + i) if reverse else first + i for i in range(count)]
        read = [(whole_ref[n], own_ref[n, :]) for n in at]  # all before the first is used: many loads are on their way at once
        for n, (whole, own) in zip(at, read, strict=True):
            state_ref[n, :] = (scale * state).astype(state_ref.dtype)
            state = whole * state + own
        return state

    rounds, rest = divmod(chunks, _AHEAD)
    state = jnp.zeros((width,), jnp.float32)
    state = jax.lax.fori_loop(0, rounds, lambda i, state: steps(i * _AHEAD, _AHEAD, state), state)
    steps(rounds * _AHEAD, rest, state)


def _apart(reverse: bool) -> jax.Array:
    """[C, C]: >> level it is 1 where that level computes the attention of row to column, the pairs of chunked.masks."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    return jnp.where(rows < columns if reverse else rows > columns, rows ^ columns, 0)


def _bounded(g, dtype):
    """Whether one product is safe: false for NaN, too."""
    return jnp.max(jnp.abs(g).sum(axis=0)) <= BOUND[jnp.dtype(dtype)]


def _centred(entry_ref, g, dtype):
    """The sum of g from the chunk's start to each token, less half of the whole sum: what splits a bounded P into one product.

    Computed in the branch that needs it: registers that hold it across the branch cost more than the product.
    """
    return _gate_sums(entry_ref[...], g, NN, dtype) - 0.5 * g.sum(axis=0)[None, :]


def _scores(sums_ref, entry_ref, q, k, g, dtype, reverse):
    """P of eq. (3): [C, C]."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    diagonal = jnp.where(rows == columns, (q * k).sum(axis=1)[:, None], 0.0)

    def level(i, scores):
        decay = jnp.exp(_gate_sums(sums_ref[i], g, NN, dtype))
        return jnp.where(_apart(reverse) >> i == 1, dot(q * decay, k * decay, NT, dtype), scores)

    def one_product():
        centred = _centred(entry_ref, g, dtype)
        return jnp.where(_apart(reverse) > 0, dot(q * jnp.exp(centred), k * jnp.exp(-centred), NT, dtype), diagonal)

    return jax.lax.cond(_bounded(g, dtype), one_product, lambda: jax.lax.fori_loop(0, sums_ref.shape[0], level, diagonal))


def _output_kernel(sums_ref, entry_ref, q_ref, k_ref, v_ref, g_ref, state_ref, out_ref, *, scale, reverse):
    dtype, g, v = q_ref.dtype, g_ref[...], v_ref[...]
    q, k = q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    scores = _scores(sums_ref, entry_ref, q, k, g, dtype, reverse)
    entry = jnp.exp(_gate_sums(entry_ref[...], g, NN, dtype))
    out = dot(q * entry, state_ref[...], NN, dtype) + dot(scores, v, NN, dtype)
    out_ref[...] = (scale * out).astype(out_ref.dtype)


def _values_kernel(sums_ref, entry_ref, exit_ref, q_ref, k_ref, g_ref, d_state_ref, d_out_ref, dv_ref, *, scale, reverse):
    """Eq. (6); d_out comes with the scale left out, d_state with it."""
    dtype, g = q_ref.dtype, g_ref[...]
    q, k = q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    scores = _scores(sums_ref, entry_ref, q, k, g, dtype, reverse)
    leave = jnp.exp(_gate_sums(exit_ref[...], g, NN, dtype))
    d_out = scale * d_out_ref[...].astype(jnp.float32)
    dv = dot(scores, d_out, TN, dtype) + dot(k * leave, d_state_ref[...], NN, dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


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
    dg += (jnp.exp(g.sum(axis=0)) * (state.astype(jnp.float32) * d_state.astype(jnp.float32)).sum(axis=1))[None, :]

    def level(i, grads):
        dq, dk, dg = grads
        decay = jnp.exp(_gate_sums(sums_ref[i], g, NN, dtype))
        d_level = jnp.where(_apart(reverse) >> i == 1, d_scores, 0.0)
        dq_level = dot(d_level, k * decay, NN, dtype) * decay
        dk_level = dot(d_level, q * decay, TN, dtype) * decay
        return dq + dq_level, dk + dk_level, dg + _gate_sums(sums_ref[i], q * dq_level + k * dk_level, TN, dtype)

    def one_product(dq, dk, dg):
        centred = _centred(entry_ref, g, dtype)
        up, down = jnp.exp(centred), jnp.exp(-centred)
        d_pairs = jnp.where(_apart(reverse) > 0, d_scores, 0.0)
        dq_pairs = dot(d_pairs, k * down, NN, dtype) * up
        dk_pairs = dot(d_pairs, q * up, TN, dtype) * down
        d_centred = q * dq_pairs - k * dk_pairs
        dg += _gate_sums(entry_ref[...], d_centred, TN, dtype) - 0.5 * d_centred.sum(axis=0)[None, :]
        return dq + dq_pairs, dk + dk_pairs, dg

    start = (dq_entry + diagonal * k, dk_leave + diagonal * q, dg)
    levels = lambda *start: jax.lax.fori_loop(0, sums_ref.shape[0], level, start)  # noqa: E731
    dq, dk, dg = jax.lax.cond(_bounded(g, dtype), one_product, levels, *start)
    dq_ref[...] = dq.astype(dq_ref.dtype)
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dg_ref[...] = dg


def _call(kernel, constants, inputs, outputs, *, interpret, parts=1, whole=0):
    """Runs `kernel` over (B H, chunks, parts).

    Args:
      constants: arrays that every program sees whole.
      inputs: [B, T, H, D], of which a program sees one head's chunk [C, D], and the first is one, or [B H, N, K, V] or
        [B H, N, K], of which it sees its chunk's [K, V] or [K].
      outputs: shapes likewise.
      parts: of D and K, of which a program sees one; of the first `whole` inputs it sees all.
    """
    _, tokens, heads, _ = inputs[0].shape

    def block(array, parts):
        _, n, k, *d = array.shape
        if n == tokens:
            shape = (None, CHUNK, None, d[0] // parts)
            return pl.BlockSpec(shape, lambda b, n, p: (b // heads, n, b % heads, p if parts > 1 else 0))
        return pl.BlockSpec((None, None, k // parts, *d), lambda b, n, p: (b, n, p if parts > 1 else 0, *[0] * len(d)))

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


def scan(whole: jax.Array, own: jax.Array, dtype, *, scale: float, reverse: bool, interpret: bool) -> jax.Array:
    """scale times the state before each chunk: whole [B H, N, K], own [B H, N, K, V] -> [B H, N, K, V] in `dtype`."""
    heads, chunks, k, v = own.shape
    block = pl.BlockSpec((None, chunks, None, v), lambda h, row: (h, 0, row, 0))
    return pl.pallas_call(
        functools.partial(_scan_kernel, scale=scale, reverse=reverse),
        grid=(heads, k),
        in_specs=[pl.BlockSpec((None, chunks, None), lambda h, row: (h, 0, row)), block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(own.shape, dtype),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
    )(whole, own)


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


def _states(sums, x, y, g, *, scale, reverse, interpret):
    """The state before each chunk, or its gradient after it, in the dtype of the products that read it: [B H, N, K, V]."""
    b, t, h, k = x.shape
    shape = (b * h, t // CHUNK, k, y.shape[3])
    outputs = [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:3], jnp.float32)]
    own, whole = _call(_state_kernel, [sums], [x, y, g], outputs, interpret=interpret)
    return scan(whole, own, x.dtype, scale=scale, reverse=reverse, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _gla(q, k, v, log_g, scale, reverse, interpret):
    return _gla_forward(q, k, v, log_g, scale, reverse, interpret)[0]


def _gla_forward(q, k, v, log_g, scale, reverse, interpret):
    sums, entry, leave = _constants(reverse)
    saved, shape = (q, k, v, log_g), v.shape
    q, k, v, g = (_pad(x) for x in saved)
    states = _states(leave, k, v, g, scale=1.0, reverse=reverse, interpret=interpret)
    outputs = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    kernel = functools.partial(_output_kernel, scale=scale, reverse=reverse)
    (out,) = _call(kernel, [sums, entry], [q, k, v, g, states], outputs, interpret=interpret)
    return _unpad(out, shape), (*saved, states)


def _gla_backward(scale, reverse, interpret, saved, d_out):
    *saved, states = saved
    sums, entry, leave = _constants(reverse)
    q, k, v, g, d_out = (_pad(x) for x in (*saved, d_out))
    d_states = _states(entry, q, d_out, g, scale=scale, reverse=not reverse, interpret=interpret)
    (dv,) = _call(
        functools.partial(_values_kernel, scale=scale, reverse=reverse),
        [sums, entry, leave],
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

    The inputs and the state before each chunk are saved for the backward pass, K V / 64 numbers a token and head.

    Raises:
      TypeError: float64.
    """
    if q.dtype == np.float64:
        raise TypeError("gla implementation pallas_gpu wants float32 or bfloat16, not float64; use xla")
    return _gla(q, k, v, log_g, scale, reverse, interpret)
