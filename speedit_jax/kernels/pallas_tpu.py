"""The chunked form of docs/gla.md as Pallas kernels for TPU.

Operands are feature-major, [B, H K, T] and [B, H V, T]: tokens fill the lanes whatever K and V are. A grid step works on one
chunk of a group of heads; the grid is (B, groups, chunks), the chunks in the order of time with the group's state, [heads K, V],
in VMEM. Matrices of one head and chunk are transposed, too: scores[s, t] is the attention of t to s. The 0/1 matrices are
those of chunked.py, given as operands.

What a grid step sees, with h heads in its group, C tokens and L levels in a chunk:
  sums_ref [L, C, C], pairs_ref [L, C, C] (transposed, as scores are), ends_ref [2, C, C] (entry and exit), whole
  q_ref, k_ref, g_ref [1, h K, C]; v_ref, out_ref, d_out_ref [1, h V, C]; gradients as what they are of
  states_ref [1, 1, h K, V], the state before the chunk; state_ref, d_state_ref [h K, V], which pass from chunk to chunk
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from speedit_jax.kernels.chunked import masks
from speedit_jax.kernels.tiles import NN, NT, TN, dot, terms

CHUNK = 128  # tokens: a vector register's lanes
_ROWS = 512  # of a block's features: 18 heads of 72 at once do not fit a v5e's VMEM in float32


def _gate_sums(g, matrix, axes, dtype):
    """g times a 0/1 matrix."""
    return sum(dot(term, matrix, axes, jnp.bfloat16) for term in terms(g, dtype))


def _decays(g, sums_ref, ends_ref, dtype):
    """exp of every level's exponent, of entry and of exit, each [H K, C], and of the whole chunk [H K, 1]."""
    levels = [jnp.exp(_gate_sums(g, sums_ref[level], NT, dtype)) for level in range(sums_ref.shape[0])]
    entry, leave = (jnp.exp(_gate_sums(g, ends_ref[i], NT, dtype)) for i in range(2))
    return levels, entry, leave, jnp.exp(g.sum(axis=1, keepdims=True))


def _scores(pairs_ref, q_levels, k_levels, rows, dtype):
    """P of eq. (3) of one head without its diagonal, transposed: [C, C]."""
    scores = jnp.zeros(pairs_ref.shape[1:], jnp.float32)
    for level, (q, k) in enumerate(zip(q_levels, k_levels, strict=True)):
        scores = jnp.where(pairs_ref[level] > 0, dot(k[rows], q[rows], TN, dtype), scores)
    return scores


def _heads(heads, dk, dv):
    """Per head its rows of q, k and g, and its rows of v."""
    return [(slice(h * dk, (h + 1) * dk), slice(h * dv, (h + 1) * dv)) for h in range(heads)]


def _forward_kernel(sums_ref, pairs_ref, ends_ref, q_ref, k_ref, v_ref, g_ref, out_ref, state_ref, *, heads, scale):
    """The outputs of a chunk, eq. (3), and the state after it, eq. (4)."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)

    dtype = q_ref.dtype
    levels, entry, leave, whole = _decays(g_ref[0], sums_ref, ends_ref, dtype)
    q, k = q_ref[0].astype(jnp.float32), k_ref[0].astype(jnp.float32)
    q_levels, k_levels = [q * e for e in levels], [k * e for e in levels]
    q_entry, k_leave = q * entry, k * leave
    for rows, columns in _heads(heads, q.shape[0] // heads, v_ref.shape[1] // heads):
        state, v = state_ref[rows], v_ref[0, columns]
        scores = _scores(pairs_ref, q_levels, k_levels, rows, dtype)
        out = dot(state, q_entry[rows], TN, dtype) + dot(v, scores, NN, dtype)
        out += (q[rows] * k[rows]).sum(axis=0, keepdims=True) * v.astype(jnp.float32)
        out_ref[0, columns] = (scale * out).astype(out_ref.dtype)
        state_ref[rows] = whole[rows] * state + dot(k_leave[rows], v, NT, dtype)


def _states_kernel(ends_ref, k_ref, v_ref, g_ref, states_ref, state_ref, *, heads):
    """The state before each chunk, for the backward pass."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)

    dtype, g = k_ref.dtype, g_ref[0]
    states_ref[0, 0] = state_ref[...]
    k_leave = k_ref[0].astype(jnp.float32) * jnp.exp(_gate_sums(g, ends_ref[1], NT, dtype))
    whole = jnp.exp(g.sum(axis=1, keepdims=True))
    for rows, columns in _heads(heads, g.shape[0] // heads, v_ref.shape[1] // heads):
        state_ref[rows] = whole[rows] * state_ref[rows] + dot(k_leave[rows], v_ref[0, columns], NT, dtype)


def _backward_kernel(
    sums_ref,
    pairs_ref,
    ends_ref,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    states_ref,
    d_out_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dg_ref,
    d_state_ref,
    *,
    heads,
    scale,
):
    """The gradients of a chunk, eq. (6) to (9), against the order of time; `d_state` passes on."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = jnp.zeros_like(d_state_ref)

    dtype = q_ref.dtype
    levels, entry, leave, whole = _decays(g_ref[0], sums_ref, ends_ref, dtype)
    q, k = q_ref[0].astype(jnp.float32), k_ref[0].astype(jnp.float32)
    q_levels, k_levels = [q * e for e in levels], [k * e for e in levels]
    q_entry_all, k_leave_all = q * entry, k * leave
    # Per head, [K, C] each; joined below, where what is alike for all heads is done once.
    dq_diagonal, dk_diagonal, dq_entry, dk_leave, d_whole = [], [], [], [], []
    dq_levels, dk_levels = [[] for _ in levels], [[] for _ in levels]
    for rows, columns in _heads(heads, q.shape[0] // heads, v_ref.shape[1] // heads):
        state, d_state = states_ref[0, 0, rows], d_state_ref[rows]
        v = v_ref[0, columns]
        d_out = scale * d_out_ref[0, columns].astype(jnp.float32)
        scores = _scores(pairs_ref, q_levels, k_levels, rows, dtype)
        d_scores = dot(v, d_out, TN, dtype)
        for level in range(len(levels)):
            d_level = jnp.where(pairs_ref[level] > 0, d_scores, 0.0)
            dq_levels[level].append(dot(k_levels[level][rows], d_level, NN, dtype))
            dk_levels[level].append(dot(q_levels[level][rows], d_level, NT, dtype))
        diagonal = (d_out * v.astype(jnp.float32)).sum(axis=0, keepdims=True)
        dq_diagonal.append(diagonal * k[rows])
        dk_diagonal.append(diagonal * q[rows])
        dq_entry.append(dot(state, d_out, NN, dtype))
        dk_leave.append(dot(d_state, v, NN, dtype))
        d_whole.append((state * d_state).sum(axis=1, keepdims=True))
        dv = dot(d_out, scores, NT, dtype) + dot(d_state, k_leave_all[rows], TN, dtype)
        dv += (q[rows] * k[rows]).sum(axis=0, keepdims=True) * d_out
        dv_ref[0, columns] = dv.astype(dv_ref.dtype)
        d_state_ref[rows] = whole[rows] * d_state + dot(q_entry_all[rows], d_out, NT, dtype)

    join = functools.partial(jnp.concatenate, axis=0)
    dq, dk, dg = join(dq_diagonal), join(dk_diagonal), whole * join(d_whole)
    for level, decay in enumerate(levels):
        dq_level, dk_level = join(dq_levels[level]) * decay, join(dk_levels[level]) * decay
        dg += _gate_sums(q * dq_level + k * dk_level, sums_ref[level], NN, dtype)
        dq, dk = dq + dq_level, dk + dk_level
    dq_level, dk_level = join(dq_entry) * entry, join(dk_leave) * leave
    dg += _gate_sums(q * dq_level, ends_ref[0], NN, dtype) + _gate_sums(k * dk_level, ends_ref[1], NN, dtype)
    dq_ref[0] = (dq + dq_level).astype(dq_ref.dtype)
    dk_ref[0] = (dk + dk_level).astype(dk_ref.dtype)
    dg_ref[0] = dg


def heads_per_step(heads: int, dk: int, dv: int) -> int:
    """The most heads whose blocks fit VMEM several times over and are whole sublanes; a divisor of `heads`."""
    fits = [n for n in range(1, heads) if heads % n == 0 and n * max(dk, dv) <= _ROWS and n * dk % 8 == n * dv % 8 == 0]
    return heads if heads * max(dk, dv) <= _ROWS or not fits else fits[-1]


def _call(kernel, inputs, outputs, *, groups, reverse, scratch, constants):
    """Runs `kernel` over (B, groups, chunks), the chunks in the order of time.

    Args:
      inputs: [B, D, T], of which a grid step sees [1, D / groups, C], or [B, N, D, V], of which it sees [1, 1, D / groups, V].
      outputs: shapes likewise.
      groups: of heads.
      reverse: from the last chunk to the first.
      scratch: shape of a group's state, float32.
      constants: arrays that every grid step sees whole.
    """
    chunks = outputs[0].shape[1] if len(outputs[0].shape) == 4 else inputs[0].shape[2] // CHUNK

    def at(n):
        return chunks - 1 - n if reverse else n

    def block(array):
        if len(array.shape) == 4:
            return pl.BlockSpec((1, 1, array.shape[2] // groups, array.shape[3]), lambda b, h, n: (b, at(n), h, 0))
        return pl.BlockSpec((1, array.shape[1] // groups, CHUNK), lambda b, h, n: (b, h, at(n)))

    whole = [pl.BlockSpec(c.shape, lambda b, h, n, rank=c.ndim: (0,) * rank) for c in constants]
    return pl.pallas_call(
        kernel,
        grid=(inputs[0].shape[0], groups, chunks),
        in_specs=whole + [block(x) for x in inputs],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(*constants, *inputs)


def _constants(reverse: bool):
    """The 0/1 matrices: sums, pairs (transposed, as scores are), entry and exit."""
    m = masks(CHUNK, reverse)
    ends = np.stack([m.entry, m.exit])
    return jnp.asarray(m.sums, jnp.bfloat16), jnp.asarray(m.pairs.swapaxes(1, 2), jnp.float32), jnp.asarray(ends, jnp.bfloat16)


def _feature_major(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B, H D, T], T padded to whole chunks with zeros, which leave a state as it is."""
    b, t, h, d = x.shape
    return jnp.pad(x.reshape(b, t, h * d).swapaxes(1, 2), ((0, 0), (0, 0), (0, -t % CHUNK)))


def _token_major(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse."""
    return x[:, :, : shape[1]].swapaxes(1, 2).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gla(q, k, v, log_g, scale, reverse):
    (_, _, h, dk), dv = q.shape, v.shape[3]
    heads = heads_per_step(h, dk, dv)
    inputs = [_feature_major(x) for x in (q, k, v, log_g)]
    (out,) = _call(
        functools.partial(_forward_kernel, heads=heads, scale=scale),
        inputs,
        [jax.ShapeDtypeStruct(inputs[2].shape, v.dtype)],
        groups=h // heads,
        reverse=reverse,
        scratch=(heads * dk, dv),
        constants=_constants(reverse),
    )
    return _token_major(out, v.shape)


def _gla_forward(q, k, v, log_g, scale, reverse):
    return _gla(q, k, v, log_g, scale, reverse), (q, k, v, log_g)


def _gla_backward(scale, reverse, saved, d_out):
    (b, _, h, dk), dv = saved[0].shape, d_out.shape[3]
    heads = heads_per_step(h, dk, dv)
    call = functools.partial(_call, groups=h // heads, scratch=(heads * dk, dv))
    q, k, v, log_g, d_out = (_feature_major(x) for x in (*saved, d_out))
    constants = _constants(reverse)
    (states,) = call(
        functools.partial(_states_kernel, heads=heads),
        [k, v, log_g],
        [jax.ShapeDtypeStruct((b, q.shape[2] // CHUNK, h * dk, dv), jnp.float32)],
        reverse=reverse,
        constants=constants[2:],
    )
    grads = call(
        functools.partial(_backward_kernel, heads=heads, scale=scale),
        [q, k, v, log_g, states, d_out],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, log_g)],
        reverse=not reverse,
        constants=constants,
    )
    return tuple(_token_major(g, x.shape) for g, x in zip(grads, saved, strict=True))


_gla.defvjp(_gla_forward, _gla_backward)


def gla(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array, *, scale: float, reverse: bool) -> jax.Array:
    """Shapes and meaning as kernels.reference.gla. Only the inputs are saved for the backward pass.

    Raises:
      TypeError: float64, which TPUs do not have.
    """
    if q.dtype == jnp.float64:
        raise TypeError("gla implementation pallas_tpu wants float32 or bfloat16, not float64; use xla")
    return _gla(q, k, v, log_g, scale, reverse)
