"""A stand-in for a pretrained image encoder: a small classifier of the same images by their labels, and what it makes of them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

WIDTH = 64  # of its features


class Classifier(nn.Module):
    """Images [B, H, W, C] -> (logits [B, classes], features [B, h, w, WIDTH]), h and w smaller by the product of the strides."""

    classes: int
    strides: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for width, stride in zip((32, WIDTH, WIDTH), self.strides, strict=True):
            x = nn.relu(nn.Conv(width, (3, 3), stride)(x))
        return nn.Dense(self.classes)(x.mean((1, 2))), x


def features_of(images: Any, strides: Sequence[int], epochs: int, batch: int = 64) -> np.ndarray:
    """Trains the classifier on a source that is in memory; returns what it makes of each image, float16 [n, h, w, WIDTH].

    Args:
      images: a speedit_jax.data.sources.ArraySource.
    """
    network, optimizer, rng = Classifier(len(images.class_names), strides), optax.adam(1e-3), np.random.default_rng(0)
    params = network.init(jax.random.key(0), images.images[:1])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x)[0], y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(epochs):
        for rows in rng.permutation(len(images))[: len(images) // batch * batch].reshape(-1, batch):
            params, state = step(params, state, images.images[rows], images.labels[rows])
    look, seen, right = jax.jit(network.apply), [], 0
    for first in range(0, len(images), 500):
        logits, features = look(params, images.images[first : first + 500])
        seen.append(np.asarray(features, np.float16))
        right += int((logits.argmax(-1) == images.labels[first : first + 500]).sum())
    print(f"the teacher calls {right / len(images):.1%} of the images by their labels")
    return np.concatenate(seen)
