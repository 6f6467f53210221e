"""Drawing any number of samples, batch by batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.sampling.conditions import Conditions


class NotFiniteError(UserError):
    """What was drawn is no picture: it holds NaN or infinity."""


def draw_batches(
    sampler: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    conditions: Conditions,
    count: int,
    batch: int,
    autoencoder: Autoencoder | None = None,
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(i, float32 [batch, H, W, C]) for each batch i: the images i * batch and on.

    All batches have one size, so that one compilation serves; the last one ends with extra images, from number `count` on. The
    devices draw the next batch while the caller uses this one.

    Args:
      sampler: of `make_sampler`; its mesh divides `batch`.
      conditions: of the images.
      count: of the images that are wanted; an image's bits depend on the batch size and not on this.
      autoencoder: decodes what is drawn; None where images are drawn, or latents are wanted as they are.
      numbers: which batches; None is all of them.

    Raises:
      NotFiniteError: weights, latents or images are not; it says which, and the likely causes.
    """
    check_weights(params)

    def draw(i: int) -> tuple[int, jax.Array, jax.Array]:
        indices = np.arange(i * batch, (i + 1) * batch)
        drawn = sampler(params, key, indices, conditions.take(indices), conditions.null_text)
        return i, drawn, autoencoder.decode(drawn) if autoencoder else drawn

    def finished(i: int, drawn: jax.Array, images: jax.Array) -> tuple[int, np.ndarray]:
        images, wanted = np.asarray(images, np.float32), count - i * batch
        _check(i * batch, np.asarray(drawn)[:wanted], "the sampled values")
        _check(i * batch, images[:wanted], "the autoencoder's pixels")
        return i, images

    begun = None
    for i in range(in_batches(count, batch) // batch) if numbers is None else numbers:
        ahead = draw(i)
        if begun:
            yield finished(*begun)
        begun = ahead
    if begun:
        yield finished(*begun)


def in_batches(count: int, batch: int) -> int:
    """How many images are drawn for `count` of them: a multiple of `batch`."""
    return count + -count % batch


def check_weights(params: Any) -> None:
    """Raises NotFiniteError, which names the first array that is not finite.

    Pictures would not always tell: a clipped infinity is black or white.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    finite = jax.device_get(_finite([leaf for _, leaf in leaves]))
    bad = [path for (path, _), good in zip(leaves, finite, strict=True) if not good]
    if bad:
        first = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise NotFiniteError(
            f"{len(bad)} of the {len(leaves)} weight arrays hold NaN or infinity (the first is {first}):"
            " take another checkpoint or other weights"
        )


@jax.jit
def _finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


def _check(first: int, images: np.ndarray, what: str) -> None:
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        raise NotFiniteError(
            f"image {first + bad.argmax()}: {what} hold NaN or infinity, though the weights are finite. Likely causes:"
            " a guidance scale that is too large, or activations in bfloat16 (model.dtype; try float32)"
        )
