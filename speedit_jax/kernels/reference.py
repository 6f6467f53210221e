"""Gated linear attention by its definition, a recurrence over tokens (docs/gla.md, eq. 1 and 2)."""

import jax
import jax.numpy as jnp


def gla(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array, *, scale: float, reverse: bool) -> jax.Array:
    """S_t = diag(exp(log_g_t)) S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t; against the order of tokens if `reverse`.

    q, k, log_g: [B, T, H, K]; v: [B, T, H, V]. Returns [B, T, H, V] in v's dtype. The state is float32, or float64 where the
    inputs are. On CPUs the fastest way to the output alone; its gradient by autodiff keeps every state.
    """
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    b, _, h, dk = q.shape

    def step(state, token):
        q_t, k_t, v_t, g_t = token
        state = jnp.exp(g_t)[..., None] * state + k_t[..., None] * v_t[..., None, :]
        # A sum over K rather than a matrix product: one row is too little for a matrix unit to keep float32 exact.
        return state, scale * (q_t[..., None] * state).sum(axis=-2)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(dtype), (q, k, v, log_g))
    start = jnp.zeros((b, h, dk, v.shape[-1]), dtype)
    _, out = jax.lax.scan(step, start, tokens, reverse=reverse)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype)
