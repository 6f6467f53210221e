"""Drawing any number of samples, batch by batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.sampling.images import to_uint8


def draw_batches(
    sampler: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    labels: np.ndarray,
    batch: int,
    autoencoder: Autoencoder | None = None,
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(i, uint8 [batch, H, W, C]) for each batch i: the images i * batch and on, whose labels are labels[i * batch] and on.

    All batches have one size, so that one compilation serves; the last one ends with extra images where labels run out. The
    devices draw the next batch while the caller uses this one.

    Args:
      sampler: of `make_sampler`; its mesh divides `batch`.
      labels: int32 [N].
      autoencoder: decodes what is drawn; None where images are drawn, or latents are shown as they are.
      numbers: which batches; None is all of the N images.
    """

    def draw(i: int) -> jax.Array:
        indices = np.arange(i * batch, (i + 1) * batch)
        images = sampler(params, key, indices, labels[indices % len(labels)])
        return autoencoder.decode(images) if autoencoder else images

    begun = None
    for i in range(-(-len(labels) // batch)) if numbers is None else numbers:
        ahead = i, draw(i)
        if begun:
            yield begun[0], to_uint8(begun[1])
        begun = ahead
    if begun:
        yield begun[0], to_uint8(begun[1])
