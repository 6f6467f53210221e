"""Images against a reference: what the evaluate command and the evaluations of training share.

`prefix` is how the user writes settings: "--" for the command's flags, "evaluation." for the config's keys.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from speedit_jax import sharding, storage
from speedit_jax.data.image_sets import Images, open_images
from speedit_jax.encoders.clip import ClipEncoder
from speedit_jax.errors import UserError
from speedit_jax.evaluation.features import Collected, Inception, Pixels, collect
from speedit_jax.evaluation.matching import Texts
from speedit_jax.metrics.frechet import Gaussian, frechet_distance
from speedit_jax.metrics.inception_score import inception_score
from speedit_jax.metrics.kernel_distance import kernel_distance
from speedit_jax.metrics.precision_recall import precision_recall
from speedit_jax.metrics.retrieval import caption_match, clip_score
from speedit_jax.metrics.statistics_file import Origin, read_statistics

Extractor = Pixels | Inception
FEATURES = ("inception", "pixels")  # names of what extracts them


@dataclasses.dataclass(frozen=True)
class Metric:
    """Which of the extractor's outputs a metric needs.

    Attributes:
      values: names of its numbers.
      moments: whose mean and covariance it compares.
      images, reference: of which it wants all numbers of the measured images, of the reference.
    """

    values: tuple[str, ...]
    moments: str | None = None
    images: str | None = None
    reference: str | None = None

    @property
    def compares(self) -> bool:
        """Whether it needs a reference."""
        return self.moments is not None or self.reference is not None

    @property
    def outputs(self) -> set[str]:
        return {self.moments, self.images, self.reference} - {None}


METRICS = {
    "fid": Metric(("fid",), moments="pool"),
    "sfid": Metric(("sfid",), moments="spatial"),
    "is": Metric(("is", "is_std"), images="logits"),
    "kid": Metric(("kid", "kid_std"), images="pool", reference="pool"),
    "pr": Metric(("precision", "recall"), images="pool", reference="pool"),
    "match": Metric(("match", "match_error", "match_chance"), images="pool", reference="pool"),
    "clip": Metric(("clip", "clip_error")),  # of a network of its own: `measure_clip`
}
ON_TEXT = ("match", "clip")  # only where they are asked for, and with texts
HIGH_IS_BETTER = ("is", "precision", "recall")


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the metrics.

    Attributes:
      seed: of KID's subsets and of the shuffle before the Inception Score's splits.
      is_splits: parts of the Inception Score.
      kid_subsets, kid_subset_size: random subsets for KID, and their size; None is 1000, or all where there are fewer.
      pr_neighbours: k of precision and recall.
    """

    seed: int = 0
    is_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int | None = None
    pr_neighbours: int = 3

    def least(self, metric: str) -> int:
        """How many images a metric needs."""
        least = {"is": self.is_splits, "kid": self.kid_subset_size or 2, "pr": self.pr_neighbours + 1, "clip": 1}
        return least.get(metric, 2)

    def subset_size(self, *counts: int) -> int:
        return self.kid_subset_size or min(1000, *counts)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Images, statistics, or, as ADM's reference batches, statistics of many images and some of them.

    Attributes:
      where: what it was opened as; None is no reference.
      origin: the images, or those that the statistics are of.
    """

    where: str | None
    images: Images | None
    statistics: dict[str, Gaussian]
    origin: Origin

    @property
    def count(self) -> int | None:
        """Of images; None where nobody says."""
        return self.origin.count

    def notes(self, crop: str | None) -> list[str]:
        """What a person should know of statistics whose images may have been made otherwise than those compared with them.

        Args:
          crop: of the latter, as in `Origin`; None is unknown.
        """
        if not self.statistics:
            return []
        if self.origin.shape is None or self.origin.crop is None:
            return [
                f"note: {self.where} does not say of what size and crop its images were; a Fréchet distance compares images that"
                " were made alike"
            ]
        how = {"none": "taken as they were", "centre": "scaled and cropped at the centre"}
        if crop is not None and self.origin.crop != crop:
            return [f"note: {self.where} is of images {how.get(self.origin.crop, self.origin.crop)}, yours were {how[crop]}"]
        return []


NO_REFERENCE = Reference(None, None, {}, Origin())


def crop_of(where: str) -> str:
    """How the images of a data source or of `open_images` were brought to their shape, as in `Origin`; before encoding, too."""
    return "centre" if where.partition(":")[0] in ("folder", "tfds", "latents") else "none"


def open_reference(
    where: str, shape: tuple[int, int, int] | None, split: str, features: str, background: str = "white"
) -> Reference:
    """What `where` names: images as open_images takes them, or an npz of statistics.

    Args:
      features: name of what extracts them; statistics must be of the same.
      background: the colour behind transparent parts, as data.background.

    Raises:
      UserError: it cannot be read, or holds neither.
    """
    images = open_images(where, shape, split, background)
    statistics: dict[str, Gaussian] = {}
    origin = Origin(len(images), images.shape, crop_of(where)) if images else Origin()
    if where.endswith(".npz"):
        statistics, told = read_statistics(storage.path(where), features)
        if statistics:
            # The images beside statistics, as in ADM's reference batches, have their size.
            origin = dataclasses.replace(told, shape=told.shape or origin.shape, crop=told.crop or origin.crop)
    if not statistics and not images:
        raise UserError(f"{where} has neither arr_0 nor mu and sigma")
    return Reference(where, images, statistics, origin)


def make_extractor(
    features: str, shape: tuple[int, int, int], weights: str | None, reference: Reference, mesh: Mesh, prefix: str
) -> Extractor:
    """What makes features of images of `shape`.

    Raises:
      UserError: it cannot, there are no weights, or the reference's statistics are of images of another size, or of other
        numbers of features.
    """
    if features == "inception" and shape[2] not in (1, 3):
        raise UserError(f"{prefix}features=inception: of images of 1 or 3 channels, not of {shape[2]}")
    try:
        extractor = Pixels(shape) if features == "pixels" else Inception(weights, mesh)
    except UserError as e:
        raise UserError(f"{prefix}{'features=pixels' if features == 'pixels' else 'inception'}: {e}") from e
    known = reference.origin.shape
    if reference.statistics and known and tuple(known) != tuple(shape):
        sizes = ["x".join(map(str, of)) for of in (known, shape)]
        raise UserError(
            f"{prefix}reference={reference.where} holds statistics of images of {sizes[0]}, but the evaluated images are"
            f" {sizes[1]}: compute statistics of this size (evaluate --save_statistics)"
        )
    for name, gaussian in reference.statistics.items():
        if len(gaussian.mean) != extractor.outputs.get(name):
            raise UserError(
                f"{prefix}reference={reference.where} has a mean of {len(gaussian.mean)} features and {prefix}features={features}"
                f" makes {extractor.outputs.get(name)}; give statistics of the same features"
            )
    return extractor


def choose_metrics(
    asked: Sequence[str],
    images: tuple[str, int],
    reference: Reference,
    features: str,
    options: Options,
    prefix: str,
    texts: Texts | None = None,
) -> list[str]:
    """The metrics asked for, or, where none are, all that can be computed.

    Args:
      images: where their number is set, and the number.
      texts: of images and reference, where they are known.

    Raises:
      UserError: one is unknown or cannot be computed, or there are too few images for it.
    """
    names = dict.fromkeys(asked or [name for name in METRICS if name not in ON_TEXT])
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"{prefix}metrics: unknown {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    obstacles = {name: _obstacle(METRICS[name], reference, features, prefix) for name in names}
    obstacles |= {name: "the evaluate command" for name in names if name in ON_TEXT and texts is None}
    if asked and (found := [f"{name} needs {why}" for name, why in obstacles.items() if why]):
        raise UserError(f"{prefix}metrics: {found[0]}")
    chosen = [name for name, why in obstacles.items() if not why]
    for name in chosen:
        counts = [images]
        if METRICS[name].reference or (METRICS[name].moments and not reference.statistics):
            counts.append((f"{prefix}reference", len(reference.images)))
        for where, count in counts:
            if count < options.least(name):
                raise UserError(
                    f"{name} needs at least {options.least(name)} images, and {where} has {count};"
                    f" give more, or fewer {prefix}metrics"
                )
    return chosen


def _obstacle(metric: Metric, reference: Reference, features: str, prefix: str) -> str | None:
    """What a metric needs that is not there."""
    if metric.compares and reference.where is None:
        return f"{prefix}reference"
    if features == "pixels" and metric.outputs - {"pool"}:
        return f"{prefix}features=inception"
    if metric.reference and not reference.images:
        return f"the reference's images, and {reference.where} holds only statistics"
    if metric.moments and reference.statistics and metric.moments not in reference.statistics:
        return f"mu_s and sigma_s, which {reference.where} does not hold"
    return None


def extract_features(
    name: str,
    images: Images | None,
    extractor: Extractor | ClipEncoder,
    mesh: Mesh,
    moments: set[str | None],
    arrays: set[str | None],
    *,
    batch_size: int,
    threads: int,
    patience: float = 0,
) -> Collected:
    """See training/features.py; with a progress bar, and without looking at images of which nothing is wanted.

    Args:
      batch_size: of images; rounded up to what the devices divide.
      patience: seconds after which the bar appears.
    """
    moments, arrays = moments - {None}, arrays - {None}
    if not images or not moments | arrays:
        return Collected({}, {})
    batch_size += -batch_size % sharding.batch_devices(mesh)
    bar = tqdm(total=len(images), desc=name, unit="image", disable=jax.process_index() != 0, delay=patience, leave=not patience)
    with bar:
        return collect(images, extractor, moments, arrays, batch_size=batch_size, threads=threads, bar=bar)


def measure_clip(
    clip: ClipEncoder, images: Images, texts: Texts, mesh: Mesh, *, batch_size: int, threads: int
) -> dict[str, float]:
    """The numbers of `clip`: CLIP score, and its standard error."""
    found = extract_features("clip", images, clip, mesh, set(), {"clip"}, batch_size=batch_size, threads=threads)
    values = clip_score(found.arrays["clip"], clip.of_texts(texts.prompts), texts.prompts)
    return dict(zip(METRICS["clip"].values, values, strict=True))


def measure(
    name: str,
    images: Collected,
    reference: Collected,
    statistics: dict[str, Gaussian],
    options: Options,
    texts: Texts | None = None,
) -> dict[str, float]:
    """The numbers of one metric.

    Raises:
      UserError: one is not finite.
    """
    values = _numbers(name, images, reference, statistics, options, texts)
    if bad := [value for value in values if not np.isfinite(values[value])]:
        raise UserError(f"{bad[0]} is not finite: the features are too large, or their statistics are damaged")
    return values


def _numbers(
    name: str,
    images: Collected,
    reference: Collected,
    statistics: dict[str, Gaussian],
    options: Options,
    texts: Texts | None,
) -> dict[str, float]:
    metric = METRICS[name]
    if metric.moments:
        return {name: frechet_distance(images.moments[metric.moments].gaussian(), statistics[metric.moments])}
    ours = images.arrays[metric.images]
    if name == "is":
        order = np.random.default_rng(options.seed).permutation(len(ours))
        values = inception_score(ours[order], options.is_splits)
    elif name == "kid":
        theirs = reference.arrays[metric.reference]
        subset_size = options.subset_size(len(ours), len(theirs))
        values = kernel_distance(ours, theirs, subsets=options.kid_subsets, subset_size=subset_size, seed=options.seed)
    elif name == "match":
        try:
            values = caption_match(ours, texts.prompts, reference.arrays[metric.reference], texts.captions)
        except ValueError as e:
            raise UserError(f"match: no image of the reference has the caption {e.args[0]!r}") from e
    else:
        values = precision_recall(reference.arrays[metric.reference], ours, options.pr_neighbours)
    return dict(zip(metric.values, values, strict=True))
