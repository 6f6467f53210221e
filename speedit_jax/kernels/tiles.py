"""Products of matrices inside Pallas kernels, which the TPU's and the GPU's share."""

import jax
import jax.numpy as jnp

# Which axes of two matrices a product sums over, by BLAS's letters: N as it is, T transposed.
NN = (((1,), (0,)), ((), ()))  # x y
TN = (((0,), (0,)), ((), ()))  # x^T y
NT = (((1,), (1,)), ((), ()))  # x y^T


def dot(x: jax.Array, y: jax.Array, axes, dtype) -> jax.Array:
    """A product of matrices rounded to `dtype`, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32)


def terms(g: jax.Array, dtype) -> list[jax.Array]:
    """float32 as a sum of bfloat16 terms, for products with 0/1 matrices, which bfloat16 holds exactly.

    Three terms are all of float32; for kernels whose inputs are bfloat16 two are more than their precision.
    """
    found, rest = [], g
    for _ in range(3 if dtype == jnp.float32 else 2):
        found.append(rest.astype(jnp.bfloat16))
        rest = rest - found[-1].astype(jnp.float32)
    return found
