r"""Losses that are added to an objective and need no network but the trained one and its average.

(1)  dispersive, of hidden states z of a group of G examples, n numbers each (arXiv 2506.09027):
       log( (1 / G^2) sum_bc exp(-d_bc / tau) ),  d_bc = |z_b - z_c|^2 / n,  over all pairs, b = c included
     between -log G, far apart, and 0, all the same
(2)  contrastive flow matching (arXiv 2506.05350): mean (v_i - u_i)^2 - lambda mean (v_i - u_j)^2 with j another example of the
     batch and u_j its own target. Its minimiser is (E[u | x] - lambda E[u]) / (1 - lambda)
(3)  alignment of tokens z with a teacher's tokens h (SRA, arXiv 2505.02831; REPA, arXiv 2410.06940), D channels each, mean over
     tokens:
       cosine:     1 - z h / (|z| |h|)
       smooth_l1:  mean over channels of d^2 / (2 beta) where d < beta, and else d - beta / 2,  d = |z - h|, beta = 0.05
(4)  spatial normalisation of such h, of each channel over the tokens of an image (iREPA, arXiv 2512.10794):
       (h - a mean h) / (std h + 1e-6),  std with n - 1
"""

import jax
import jax.numpy as jnp


def dispersive(z: jax.Array, group: int, temperature: float) -> jax.Array:
    """(1), of each example's group. [B]

    Groups are the rows of equal r mod (B / group), so that a group lies in one microbatch (step.microbatches).

    Args:
      z: [B, ...], B a multiple of `group`.
    """
    count = z.shape[0] // group
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32)).reshape(group, count, -1).swapaxes(0, 1)  # [groups, G, n]
    square = (z**2).mean(axis=-1)
    products = jnp.einsum("gbn,gcn->gbc", z, z, precision="highest") / z.shape[-1]
    distances = (square[:, :, None] + square[:, None, :] - 2 * products).clip(min=0)
    value = jax.nn.logsumexp(-distances / temperature, axis=(1, 2)) - 2 * jnp.log(group)
    return jnp.tile(value, group)


def _unit(z: jax.Array) -> jax.Array:
    """z over its length, of its last axis; zeros stay zeros, with a finite gradient."""
    return z * jax.lax.rsqrt(jnp.maximum((z**2).sum(axis=-1, keepdims=True), 1e-16))


def _cosine(z, h):
    return 1 - (_unit(z) * _unit(h)).sum(axis=-1)


def _smooth_l1(z, h, beta=0.05):
    difference = jnp.abs(z - h)
    return jnp.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2).mean(axis=-1)


ALIGNMENTS = {"cosine": _cosine, "smooth_l1": _smooth_l1}


def alignment(z: jax.Array, h: jax.Array, kind: str) -> jax.Array:
    """(3), of each example. [B]

    The published code's cosine is over tokens, not over channels: there the angle is between all tokens' values of a channel.

    Args:
      z, h: [B, T, D]; no gradient goes to h.
      kind: of ALIGNMENTS.
    """
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    return ALIGNMENTS[kind](z.astype(dtype), jax.lax.stop_gradient(h).astype(dtype)).mean(axis=1)


def of_grid(features: jax.Array, grid: tuple[int, int], spatial_norm: float) -> jax.Array:
    """Features [B, h, w, F] as targets of (3) for tokens on `grid`: [B, T, F], at least float32.

    A finer grid is averaged over the part of it that a token stands for. With `spatial_norm`, a, (4) follows.
    """
    count, h, w, width = features.shape
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    parts = features.reshape(count, grid[0], h // grid[0], grid[1], w // grid[1], width)
    tokens = parts.mean(axis=(2, 4)).reshape(count, -1, width)
    if not spatial_norm:
        return tokens
    mean, std = tokens.mean(axis=1, keepdims=True), tokens.std(axis=1, keepdims=True, ddof=1)
    return (tokens - spatial_norm * mean) / (std + 1e-6)


def negatives(key: jax.Array, count: int) -> jax.Array:
    """For each of `count` examples another one, uniformly. [count] int32"""
    step = jax.random.randint(key, (count,), 1, count)
    return (jnp.arange(count, dtype=jnp.int32) + step) % count
