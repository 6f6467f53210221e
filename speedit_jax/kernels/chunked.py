"""Gated linear attention in chunks of tokens, as plain XLA, safe for any gate; the equations are docs/gla.md's.

Within a chunk of C tokens the decay from token s to token t is split where a dyadic halving separates them: at level l rows
whose l-th bit is 1 (upper) attend to the sibling half (lower), and both factors of

  exp(sum_{s < r <= t} g_r) = exp(sum from the upper half's start to t) * exp(sum after s to the lower half's end)

have exponents <= 0: none can overflow whatever the gates, and no two large sums are subtracted (eq. 5). Every exponent is a 0/1
matrix times g. Between chunks the state is carried by a scan (eq. 4); `reverse` transposes the matrices and turns the scan.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 16  # the best on CPUs: bigger chunks cost FLOPs there, which accelerators give away


class Masks(NamedTuple):
    """0/1 matrices of one chunk, rows the token that is computed.

    Attributes:
      pairs: [L, C, C], pairs[l, t, s] = 1 where level l computes the attention of t to s.
      sums: [L, C, C], sums[l] @ g is each row's exponent at level l.
      entry: [C, C], entry @ g is the decay from before the chunk to t, t included.
      exit: [C, C], exit @ g is the decay after s to the chunk's end.
    """

    pairs: np.ndarray
    sums: np.ndarray
    entry: np.ndarray
    exit: np.ndarray


@functools.cache
def masks(chunk: int, reverse: bool) -> Masks:
    """The masks for a chunk of a power of two tokens; reversed time flips both axes of each."""
    t, s = np.mgrid[:chunk, :chunk]
    pairs, sums = [], []
    for level in range(chunk.bit_length() - 1):
        half = t >> level
        upper = half & 1 == 1
        pairs.append(upper & (s >> level == half - 1))
        same_half = s >> level == half
        sums.append(same_half & np.where(upper, s <= t, s > t))
    arrays = (np.stack(pairs), np.stack(sums), s <= t, s > t)
    return Masks(*(a[..., ::-1, ::-1] if reverse else a for a in arrays))


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST)


def _decays(m: Masks, g: jax.Array):
    """exp of every level's exponent [L, B, H, C, K], of entry and of exit [B, H, C, K], and of the whole chunk [B, H, K]."""
    as_g = lambda mask: jnp.asarray(mask, g.dtype)  # noqa: E731
    levels = jnp.exp(_dot("lij,bhjc->lbhic", as_g(m.sums), g))
    entry = jnp.exp(_dot("ij,bhjc->bhic", as_g(m.entry), g))
    leave = jnp.exp(_dot("ij,bhjc->bhic", as_g(m.exit), g))
    return levels, entry, leave, jnp.exp(g.sum(axis=2))


def _scores(m: Masks, q: jax.Array, k: jax.Array, levels: jax.Array) -> jax.Array:
    """P of eq. (3): [B, H, C, C], the scale left out."""
    parts = _dot("lbhic,lbhjc->lbhij", q * levels, k * levels)
    eye = jnp.eye(q.shape[2], dtype=q.dtype)
    return jnp.where(m.pairs[:, None, None], parts, 0).sum(axis=0) + eye * (q * k).sum(axis=-1)[..., None]


def _forward(q, k, v, g, scale, reverse, keep_states):
    """All arrays [N, B, H, C, .]; returns the output and, if asked, the state before each chunk [N, B, H, K, V]."""
    m = masks(q.shape[3], reverse)

    def chunk(state, x):
        q, k, v, g = x
        levels, entry, leave, whole = _decays(m, g)
        scores = _scores(m, q, k, levels)
        out = scale * (_dot("bhic,bhcv->bhiv", q * entry, state) + _dot("bhij,bhjv->bhiv", scores, v))
        after = whole[..., None] * state + _dot("bhic,bhiv->bhcv", k * leave, v)
        return after, (out, state if keep_states else None)

    start = jnp.zeros((*q.shape[1:3], q.shape[-1], v.shape[-1]), q.dtype)
    return jax.lax.scan(chunk, start, (q, k, v, g), reverse=reverse)[1]


def _backward(q, k, v, g, d_out, scale, reverse):
    """Gradients of all four inputs (eq. 6 to 9): the states again, then the chunks against their order."""
    m = masks(q.shape[3], reverse)
    _, states = _forward(q, k, v, g, scale, reverse, keep_states=True)
    causal = m.pairs.any(axis=0)
    eye = np.eye(q.shape[3], dtype=bool)

    def chunk(d_state, x):
        q, k, v, g, d_out, state = x
        levels, entry, leave, whole = _decays(m, g)
        scores = _scores(m, q, k, levels)
        d_out = scale * d_out
        # Masked before it meets anything else: pairs that attention does not see may be huge.
        d_scores = jnp.where(causal | eye, _dot("bhiv,bhjv->bhij", d_out, v), 0)
        d_levels = jnp.where(m.pairs[:, None, None], d_scores, 0)
        dq_levels = _dot("lbhij,lbhjc->lbhic", d_levels, k * levels) * levels
        dk_levels = _dot("lbhij,lbhic->lbhjc", d_levels, q * levels) * levels
        diagonal = (d_out * v).sum(axis=-1)[..., None]
        dq_entry = _dot("bhiv,bhcv->bhic", d_out, state) * entry
        dk_leave = _dot("bhiv,bhcv->bhic", v, d_state) * leave

        dq = dq_levels.sum(axis=0) + diagonal * k + dq_entry
        dk = dk_levels.sum(axis=0) + diagonal * q + dk_leave
        dv = _dot("bhij,bhiv->bhjv", scores, d_out) + _dot("bhic,bhcv->bhiv", k * leave, d_state)
        # Each exponent's gradient is what it multiplies times that factor's gradient; the matrices carry it back to g.
        as_g = lambda mask: jnp.asarray(mask, g.dtype)  # noqa: E731
        dg = _dot("lij,lbhic->bhjc", as_g(m.sums), q * dq_levels + k * dk_levels)
        dg += _dot("ij,bhic->bhjc", as_g(m.entry), q * dq_entry) + _dot("ij,bhic->bhjc", as_g(m.exit), k * dk_leave)
        dg += (whole * (state * d_state).sum(axis=-1))[:, :, None]
        before = whole[..., None] * d_state + _dot("bhic,bhiv->bhcv", q * entry, d_out)
        return before, (dq, dk, dv, dg)

    end = jnp.zeros_like(states[0])
    return jax.lax.scan(chunk, end, (q, k, v, g, d_out, states), reverse=not reverse)[1]


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, H, .] -> [N, B, H, C, .]; T is padded with zeros, which leave a state as it is."""
    b, t, h, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % chunk), (0, 0), (0, 0)))
    return x.reshape(b, -1, chunk, h, d).transpose(1, 0, 3, 2, 4)


def _join(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_split`."""
    n, b, h, c, d = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, d)[:, :tokens]


def _inputs(*arrays: jax.Array) -> list[jax.Array]:
    dtype = jnp.promote_types(arrays[-1].dtype, jnp.float32)
    return [_split(x.astype(dtype), CHUNK) for x in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gla(q, k, v, log_g, scale, reverse):
    out, _ = _forward(*_inputs(q, k, v, log_g), scale, reverse, keep_states=False)
    return _join(out, q.shape[1]).astype(v.dtype)


def _gla_forward(q, k, v, log_g, scale, reverse):
    return _gla(q, k, v, log_g, scale, reverse), (q, k, v, log_g)


def _gla_backward(scale, reverse, saved, d_out):
    grads = _backward(*_inputs(*saved, d_out.astype(jnp.promote_types(d_out.dtype, jnp.float32))), scale, reverse)
    return tuple(_join(g, x.shape[1]).astype(x.dtype) for g, x in zip(grads, saved, strict=True))


_gla.defvjp(_gla_forward, _gla_backward)


def gla(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array, *, scale: float, reverse: bool) -> jax.Array:
    """Shapes and meaning as kernels.reference.gla. Only the inputs are saved for the backward pass."""
    return _gla(q, k, v, log_g, scale, reverse)
