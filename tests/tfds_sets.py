"""Small sets that tfds' own writer prepares in a moment, without TensorFlow: pictures of many sizes, and what goes wrong."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = [(20, 12), (9, 31), (64, 64), (12, 8)]  # width, height
NAMES = ("cat", "dog", "a, b")
TRAIN, TEST, UNLABELLED = range(14), range(14, 20), range(20, 22)


def colour(i):
    return (10 * i, 255 - 10 * i, 50 * (i % 3))


def encoded(i):
    """Picture i, of one colour: a PNG or, of odd numbers, a JPEG."""
    file = io.BytesIO()
    Image.new("RGB", SIZES[i % 4], colour(i)).save(file, "JPEG" if i % 2 else "PNG", quality=95)
    return file.getvalue()


class Animals(tfds.core.GeneratorBasedBuilder):
    """Class i % 3 of picture i. The features besides image and label are not read, and one cannot be."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="tame"), tfds.core.BuilderConfig(name="wild")]  # noqa: RUF012

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=NAMES)}
        features |= {"mask": tfds.features.Image(shape=(None, None, 1)), "size": tfds.features.ClassLabel(num_classes=4)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        wild = bool(self.builder_config) and self.builder_config.name == "wild"
        parts = {"train": TRAIN, "test": TEST} | ({"unlabelled": UNLABELLED} if wild else {})
        return {name: self._generate_examples(numbers) for name, numbers in parts.items()}

    def _generate_examples(self, numbers):
        for i in numbers:
            label = i % 3 if i in TRAIN or i in TEST else -1
            yield i, {"image": encoded(i), "label": label, "mask": b"not a picture", "size": i % 4}


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Without labels; the image goes by another name; one record is damaged."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"photo": tfds.features.Image(), "year": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"photo": encoded(i) if i != 3 else b"text", "year": 2000 + i}


class Numbers(tfds.core.GeneratorBasedBuilder):
    """Nothing to see."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"number": np.int64, "label": tfds.features.ClassLabel(num_classes=2)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"number": 1, "label": 0}


class ByHand(Numbers):
    """Cannot be downloaded."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Buy it."

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples() if dl_manager.manual_dir else ()}


def prepare(directory: Path) -> None:
    """Writes animals/tame, animals/wild, pictures and numbers, as speedit_jax.prepare does."""
    tame, wild = (Animals(config=name, data_dir=directory, file_format="array_record") for name in ("tame", "wild"))
    for builder in (tame, wild, *(Set(data_dir=directory, file_format="array_record") for Set in (Pictures, Numbers))):
        builder.download_and_prepare(file_format="array_record")
