r"""Losses that are added to an objective and need no other network.

(1)  dispersive, of hidden states z of a group of G examples, n numbers each (arXiv 2506.09027):
       log( (1 / G^2) sum_bc exp(-d_bc / tau) ),  d_bc = |z_b - z_c|^2 / n,  over all pairs, b = c included
     between -log G, far apart, and 0, all the same
(2)  contrastive flow matching (arXiv 2506.05350): mean (v_i - u_i)^2 - lambda mean (v_i - u_j)^2 with j another example of the
     batch and u_j its own target. Its minimiser is (E[u | x] - lambda E[u]) / (1 - lambda)
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


def negatives(key: jax.Array, count: int) -> jax.Array:
    """For each of `count` examples another one, uniformly. [count] int32"""
    step = jax.random.randint(key, (count,), 1, count)
    return (jnp.arange(count, dtype=jnp.int32) + step) % count
