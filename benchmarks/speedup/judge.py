"""The judge: a small convolutional classifier of the real images, trained once and then frozen, whose features are compared.

It is not Inception: its distances compare runs of this comparison with each other, and with nothing else.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks.speedup.data import ImageSet
from speedit_jax.data.sources import ArraySource
from speedit_jax.metrics.frechet import Gaussian, Moments, frechet_distance
from speedit_jax.metrics.kernel_distance import kernel_distance
from speedit_jax.storage import replacing, sha256

FEATURES, _CHANNELS, _BATCH = 64, (32, 64, 64), 128
EPOCHS = {"fashion": 4, "emoji": 60, "digits": 10}
REFERENCE = 20_000  # training images that samples are compared with, at most
KID_SUBSETS, KID_SUBSET = 20, 250


def _initial(key: jax.Array, channels: int, num_classes: int) -> dict[str, jax.Array]:
    sizes = {}
    for i, width in enumerate(_CHANNELS):
        sizes[f"conv{i}"], channels = (3, 3, channels, width), width
    sizes |= {"features": (channels, FEATURES), "logits": (FEATURES, num_classes)}
    params = {}
    for i, (name, shape) in enumerate(sizes.items()):
        fan_in = np.prod(shape[:-1])
        params[name] = jax.random.normal(jax.random.fold_in(key, i), shape) * np.sqrt(2 / fan_in)
        params[f"{name}_bias"] = jnp.zeros(shape[-1])
    return params


def _features(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """[B, H, W, C] in [-1, 1] -> [B, FEATURES]."""
    for i in range(len(_CHANNELS)):
        x = jax.lax.conv_general_dilated(x, params[f"conv{i}"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[f"conv{i}_bias"])
    return jax.nn.relu(x.mean((1, 2)) @ params["features"] + params["features_bias"])


def _logits(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    return features @ params["logits"] + params["logits_bias"]


def train(images: ImageSet) -> dict[str, np.ndarray]:
    """The weights; the same each time on the same machine."""
    data, key, rng = images.train, jax.random.key(0), np.random.default_rng(0)
    params = _initial(key, data.image_shape[-1], len(data.class_names))
    batch = min(_BATCH, len(data))
    steps = EPOCHS[images.name] * (len(data) // batch)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(_logits(params, _features(params, x)), y).mean()

    @jax.jit
    def step(params, opt, x, y):
        updates, opt = optimizer.update(jax.grad(loss)(params, x, y), opt, params)
        return optax.apply_updates(params, updates), opt

    opt = optimizer.init(params)
    for _ in tqdm(range(EPOCHS[images.name]), f"judge of {images.name}"):
        order = rng.permutation(len(data))[: len(data) // batch * batch]
        for rows in order.reshape(-1, batch):
            params, opt = step(params, opt, data.images[rows], data.labels[rows])
    return {name: np.asarray(value) for name, value in params.items()}


class Judge:
    """The frozen classifier and its view of the real images.

    Attributes:
      identity: {"weights": checksum, "accuracy": on held-out images, "floor": the scores of held-out images as if drawn}.
    """

    def __init__(self, images: ImageSet, path: Path, num_images: int):
        """Reads the weights from `path`, or trains the classifier and writes them there.

        Args:
          num_images: that a run draws; as many held-out ones give the floor.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                np.savez(file, **train(images))
        with np.load(path) as found:
            self._params: Any = {name: jnp.asarray(found[name]) for name in found}
        self._look = jax.jit(lambda x: (f := self.features(x), _logits(self._params, f).argmax(-1)))
        self._reference, _ = self._see(images.train.images[:REFERENCE])
        self._gaussian = Moments.of(self._reference).gaussian()
        held_out = images.held_out
        _, guesses = self._see(held_out.images)
        self.identity = {
            "weights": sha256(path),
            "accuracy": float((guesses == held_out.labels).mean()),
            "floor": self.score(*_some(held_out, num_images)),
        }

    def _see(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = [self._look(images[i : i + 500]) for i in range(0, len(images), 500)]
        features, guesses = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*seen, strict=True))
        return features, guesses

    def features(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] in [-1, 1] -> [B, FEATURES]."""
        return _features(self._params, x)

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """{"fd", "kid", "accuracy"} of images [n, H, W, C] in [-1, 1] that were drawn for labels [n]."""
        features, guesses = self._see(images)
        size = min(KID_SUBSET, len(features), len(self._reference))
        return {
            "fd": frechet_distance(Moments.of(features).gaussian(), self._gaussian),
            "kid": kernel_distance(features, self._reference, subsets=KID_SUBSETS, subset_size=size)[0],
            "accuracy": float((guesses == labels).mean()),
        }


class Panel:
    """The judge beside two that no label has taught: the images' own 8 x 8 means, and the same network before its training.

    Attributes:
      floor: the scores of held-out images as if drawn.
    """

    def __init__(self, judge: Judge, images: ImageSet, num_images: int):
        untaught = _initial(jax.random.key(1), images.train.image_shape[-1], 1)
        looks = {"judge": judge.features, "8 x 8 pixels": _means, "untrained network": functools.partial(_features, untaught)}
        self._looks = {name: jax.jit(look) for name, look in looks.items()}
        self._real = {name: self._gaussian(name, images.train.images[:REFERENCE]) for name in looks}
        self.floor = self.score(*_some(images.held_out, num_images))

    def _gaussian(self, name: str, images: np.ndarray) -> Gaussian:
        return Moments.of(np.concatenate([self._looks[name](images[i : i + 500]) for i in range(0, len(images), 500)])).gaussian()

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Each one's Fréchet distance of images [n, H, W, C] to the training images; `labels` are not looked at."""
        del labels
        return {name: frechet_distance(self._gaussian(name, images), real) for name, real in self._real.items()}


def _some(source: ArraySource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images and their labels, always the same."""
    chosen = np.random.default_rng(0).permutation(len(source))[:count]
    return source.images[chosen], source.labels[chosen]


def _means(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 64 C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, 8, height // 8, 8, width // 8, channels).mean((2, 4)).reshape(batch, -1)


def digest(*arrays: np.ndarray, start: str = "") -> str:
    """A checksum of arrays that goes on from `start`."""
    found = hashlib.sha256(start.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
