"""Evaluation during training: pictures of the EMA weights against a reference, as the config's `evaluation` section says."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from speedit_jax.data.image_sets import Images, SourceImages, fingerprint, some
from speedit_jax.data.sources import Source
from speedit_jax.errors import UserError
from speedit_jax.evaluation.comparison import (
    FEATURES,
    HIGH_IS_BETTER,
    METRICS,
    NO_REFERENCE,
    Extractor,
    Options,
    Reference,
    choose_metrics,
    crop_of,
    extract_features,
    make_extractor,
    measure,
    open_reference,
)
from speedit_jax.evaluation.features import Collected
from speedit_jax.metrics.frechet import Gaussian
from speedit_jax.metrics.statistics_file import STATISTICS, Origin, read_statistics, write_statistics
from speedit_jax.sampling.sampler import FixedSamples

PREFIX = "evaluation."


class Evaluation:
    """Measures weights, each time by the same noise and settings.

    Args:
      config: of the whole run.
      source: what it trains on.
      pictures: what is drawn of the weights.
      sampling: how they are drawn, JSON.

    Raises:
      UserError: a setting cannot be, or does not fit the reference.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        source: Source,
        pictures: FixedSamples,
        sampling: dict[str, Any],
        mesh: Mesh,
    ):
        section = config.evaluation
        if section.features not in FEATURES:
            raise UserError(f"unknown evaluation.features {section.features!r}; choose one of {', '.join(FEATURES)}")
        if source.encoded_by and not pictures.autoencoder:
            raise UserError(f"evaluation.every={section.every}: to evaluate a run on latents, set data.vae to their autoencoder")
        shape = pictures.autoencoder.image_shape(source.image_shape) if source.encoded_by else source.image_shape
        asked = list(filter(None, section.metrics.replace(" ", "").split(",")))
        compared = any(METRICS[name].compares for name in asked or METRICS if name in METRICS)
        reference = _open_reference(config, source, shape) if compared else NO_REFERENCE
        options, count = Options(section.seed), ("evaluation.num_images", section.num_images)
        names = choose_metrics(asked, count, reference, section.features, options, PREFIX)
        values = [value for name in names for value in METRICS[name].values]
        if section.best not in values:
            raise UserError(f"evaluation.best={section.best}: evaluation.metrics={section.metrics} gives {', '.join(values)}")
        extractor = make_extractor(section.features, shape, section.inception, reference, mesh, PREFIX)

        self._metrics = {name: METRICS[name] for name in names}
        self._reference, self._extractor, self._options, self._mesh = reference, extractor, options, mesh
        self._pictures, self._shape, self._best, self._every = pictures, shape, section.best, section.every
        self._sizes = {"batch_size": section.batch_size, "threads": config.data.threads}
        self._crop = crop_of(config.data.source)
        self._identity = _identity(reference, extractor)
        how = {"best": section.best, "num_images": section.num_images, "seed": section.seed, "reference": self._identity}
        self._how = json.loads(json.dumps(how | {"sampling": sampling}))  # as it will be read again: lists for tuples

    def __str__(self) -> str:
        reference = self._reference
        count = "an unknown number of" if reference.count is None else f"{reference.count:,}"
        against = f" against {count} of {reference.where}" if reference.where else ""
        return (
            f"every {self._every:,} steps {', '.join(self._metrics)} of {self._pictures.count:,} images{against},"
            f" {self._extractor.name} features; the best {self._best} is kept"
        ) + "".join(f"\n           {note}" for note in reference.notes(self._crop))

    def prepare(self, workdir: Path) -> None:
        """Extracts the reference's features; its statistics are kept in the workdir, and read when the run goes on."""
        reference, metrics = self._reference, self._metrics.values()
        self._statistics = reference.statistics
        if not self._statistics and any(metric.moments for metric in metrics):
            self._statistics = self._kept_statistics(workdir)
        arrays = {metric.reference for metric in metrics}
        # As many as are drawn: neither time nor memory grows with the reference.
        few = reference.images and some(reference.images, self._pictures.count)
        self._of_reference = self._gather("reference", few, set(), arrays)

    def _kept_statistics(self, workdir: Path) -> dict[str, Gaussian]:
        path = workdir / f"reference_{self._identity}.npz"
        # All hosts must take part in the extraction, or none.
        if multihost_utils.broadcast_one_to_all(np.int32(path.is_file())):
            return read_statistics(path, self._extractor.name)[0]
        sums = self._gather("reference", self._reference.images, self._extractor.outputs.keys() & STATISTICS, set()).moments
        statistics = {name: of.gaussian() for name, of in sums.items()}
        if jax.process_index() == 0:
            write_statistics(path, statistics, self._extractor.name, self._reference.origin)
        return statistics

    def _gather(self, name: str, images: Images | None, moments: set[str | None], arrays: set[str | None]) -> Collected:
        # A bar of its own beside that of training, for those who wait.
        return extract_features(name, images, self._extractor, self._mesh, moments, arrays, **self._sizes, patience=10)

    def __call__(self, params: Any) -> dict[str, float]:
        """The numbers of some weights, after `prepare`."""
        metrics = self._metrics.values()
        drawn = _Drawn(self._pictures, params, self._shape)
        ours = self._gather("evaluation", drawn, {metric.moments for metric in metrics}, {metric.images for metric in metrics})
        values = {}
        for name in self._metrics:
            values |= measure(name, ours, self._of_reference, self._statistics, self._options)
        # To the bit the same on all hosts: each decides by them which checkpoint is the best.
        numbers = multihost_utils.broadcast_one_to_all(list(values.values()))
        return dict(zip(values, map(float, numbers), strict=True))

    def record(self, values: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint says of its own evaluation.

        Returns:
          JSON: the values, a score that is lower where they are better, and how they came about: scores of different ways do
          not compare.
        """
        score = values[self._best]
        return {"values": values, "score": -score if self._best in HIGH_IS_BETTER else score, "how": self._how}


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """FixedSamples of some weights, as Images of data/image_sets.py: each batch is drawn when it is asked for."""

    pictures: FixedSamples
    params: Any
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.pictures.count

    def batches(self, size: int, threads: int) -> Iterator[np.ndarray]:
        del threads
        return self.pictures.draw(self.params, size)


def _open_reference(config: ml_collections.ConfigDict, source: Source, shape: tuple[int, int, int]) -> Reference:
    """What evaluation.reference names, by default the images of training.

    Raises:
      UserError: it cannot be read, or is no reference for pictures of this shape.
    """
    section = config.evaluation
    if not section.reference:
        if source.encoded_by:
            raise UserError(
                "evaluation.reference is missing: stored latents cannot serve as the reference; give an npz or a folder of images"
            )
        if section.split != "train":
            raise UserError(f"evaluation.split={section.split} needs evaluation.reference, which is not set")
        origin = Origin(len(source), tuple(source.image_shape), crop_of(config.data.source))
        reference = Reference(config.data.source, SourceImages(source), {}, origin)
    else:
        reference = open_reference(section.reference, shape, section.split, section.features, config.data.background)
    images = reference.images
    if images and images.shape != tuple(shape):
        sizes = ["x".join(map(str, of)) for of in (images.shape, shape)]
        raise UserError(f"evaluation.reference={section.reference} has images of {sizes[0]}, but this run draws {sizes[1]}")
    return reference


def _identity(reference: Reference, extractor: Extractor) -> str:
    """Equal for equal features of equal references, and on all hosts: whose copies of a file have times of their own."""
    digest = hashlib.sha256(f"{extractor.name} {(extractor.identity or {}).get('sha256')}".encode())
    for name, gaussian in sorted(reference.statistics.items()):
        digest.update(name.encode() + gaussian.mean.tobytes() + gaussian.covariance.tobytes())
    if images := reference.images:
        digest.update(f"{images.shape} {len(images)} {fingerprint(images)}".encode())
    of_first = multihost_utils.broadcast_one_to_all(np.frombuffer(digest.digest()[:6], np.uint8))
    return of_first.tobytes().hex()
