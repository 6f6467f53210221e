"""Measures how good images are, by comparing them with a reference set.

  python -m speedit_jax.evaluate --images=runs/digits/new.npz --reference=digits --features=pixels
  python -m speedit_jax.evaluate --images=samples.npz --reference=folder:/path/to/images --inception=FILE.pth --out=samples.json
  python -m speedit_jax.evaluate --reference=folder:/path/to/images --size=256 --inception=FILE.pth --save_statistics=ref.npz

--images and --reference are FILE.npz with arr_0 (uint8 [n, H, W, C], as sample and ADM write it), a directory of images,
folder:PATH or tfds:NAME (scaled and cropped as in training), digits or synthetic; --reference may also be an npz of ADM's
statistics.
docs/evaluation.md says what the numbers are, and what makes them comparable.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from speedit_jax import __version__, cli
from speedit_jax.data.image_sets import KINDS, Images, open_images
from speedit_jax.errors import UserError
from speedit_jax.interop import files
from speedit_jax.metrics.frechet import Gaussian, frechet_distance
from speedit_jax.metrics.inception_score import inception_score
from speedit_jax.metrics.kernel_distance import kernel_distance
from speedit_jax.metrics.precision_recall import precision_recall
from speedit_jax.metrics.statistics_file import STATISTICS, read_statistics, write_statistics
from speedit_jax.training import sharding
from speedit_jax.training.features import Collected, Inception, Pixels, collect

_IMAGES = flags.DEFINE_string("images", None, "What to measure.")
_REFERENCE = flags.DEFINE_string("reference", None, "What to compare with: images, or an npz with mu and sigma.")
_METRICS = flags.DEFINE_list("metrics", None, "Of fid, sfid, is, kid and pr. Default: all that features and reference allow.")
_FEATURES = flags.DEFINE_enum("features", "inception", ["inception", "pixels"], "pixels need no weights, for tiny images.")
_INCEPTION = flags.DEFINE_string("inception", None, "Weights of FID's Inception-v3: .pth, .safetensors or .npz.")
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers and all settings, JSON.")
_SAVE_STATISTICS = flags.DEFINE_string("save_statistics", None, "Where to write the reference's statistics, an npz as ADM's.")
_SPLIT = flags.DEFINE_string("split", "train", "Of --reference, digits or tfds: as data.split; of the digits also held_out.")
_SIZE = flags.DEFINE_list(
    "size", None, "Of folder:, tfds:, synthetic: SIDE, or HEIGHT,WIDTH[,CHANNELS]. Default: that of --images."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of KID's subsets and of the shuffle before the Inception Score's splits.", lower_bound=0)
_IS_SPLITS = flags.DEFINE_integer("is_splits", 10, "Parts of the Inception Score.", lower_bound=1)
_KID_SUBSETS = flags.DEFINE_integer("kid_subsets", 100, "Random subsets for KID.", lower_bound=1)
_KID_SUBSET_SIZE = flags.DEFINE_integer("kid_subset_size", None, "Default: 1000, or all where there are fewer.", lower_bound=2)
_PR_NEIGHBOURS = flags.DEFINE_integer("pr_neighbours", 3, "k of precision and recall.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Metric:
    """Which of the extractor's outputs a metric needs.

    Attributes:
      moments: whose mean and covariance it compares.
      images, reference: of which it wants all numbers of the measured images, of the reference.
    """

    moments: str | None = None
    images: str | None = None
    reference: str | None = None

    @property
    def outputs(self) -> set[str]:
        return {self.moments, self.images, self.reference} - {None}


METRICS = {
    "fid": Metric(moments="pool"),
    "sfid": Metric(moments="spatial"),
    "is": Metric(images="logits"),
    "kid": Metric(images="pool", reference="pool"),
    "pr": Metric(images="pool", reference="pool"),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Images, statistics, or, as ADM's reference batches, statistics of many images and some of them.

    Attributes:
      count: of the images that the statistics are of; None where nobody says.
    """

    images: Images | None
    statistics: dict[str, Gaussian]
    count: int | None


def evaluate() -> None:
    if not _REFERENCE.value:
        raise UserError("--reference is missing; --help has examples")
    if not _IMAGES.value and not _SAVE_STATISTICS.value:
        raise UserError("--images is missing; or give --save_statistics=FILE.npz, for the reference's statistics alone")
    out, save = (Path(flag.value).expanduser() if flag.value else None for flag in (_OUT, _SAVE_STATISTICS))
    for path in filter(None, (out, save)):
        cli.check_writable(path)
    images, reference = open_both()
    names = choose_metrics(images, reference) if images else []
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    shape = (images or reference.images).shape
    extractor = Pixels(shape) if _FEATURES.value == "pixels" else Inception(_INCEPTION.value, mesh)
    check_statistics(reference, extractor.outputs)

    metrics = [METRICS[name] for name in names]
    moments = {metric.moments for metric in metrics}
    of_images = gather("images", images, extractor, mesh, moments, {metric.images for metric in metrics})
    if reference.statistics:
        moments = set()
    elif save:
        moments = moments | (extractor.outputs.keys() & STATISTICS)
    of_reference = gather("reference", reference.images, extractor, mesh, moments, {metric.reference for metric in metrics})
    statistics = reference.statistics or {name: sums.gaussian() for name, sums in of_reference.moments.items()}
    if jax.process_index() != 0:
        return
    if save:
        write_statistics(save, statistics, extractor.name, reference.count)
        print(f"statistics of {reference.count} images, {extractor.name} features, in {save}")
    if images:
        values = {}
        for name in tqdm(names, unit="metric", leave=False):
            values |= measure(name, of_images, of_reference, statistics)
        report(values, images, reference, extractor, out, mesh.size)


def open_both() -> tuple[Images | None, Reference]:
    """What --images and --reference name.

    Raises:
      UserError: they cannot be read, or do not go together.
    """
    shape = parse_size()
    images = None
    if _IMAGES.value:
        images = open_images(_IMAGES.value, shape)
        if images is None:
            raise UserError(f"--images={_IMAGES.value} has no arr_0; give {KINDS}")
        shape = shape or images.shape
    compared = open_images(_REFERENCE.value, shape, _SPLIT.value)
    path, statistics, count = Path(_REFERENCE.value).expanduser(), {}, len(compared) if compared else None
    if path.suffix == ".npz":
        statistics, counted = read_statistics(path, _FEATURES.value)
        count = counted if statistics else count
    if not statistics and not compared:
        raise UserError(f"--reference={_REFERENCE.value} has neither arr_0 nor mu and sigma")
    if _SAVE_STATISTICS.value and statistics:
        raise UserError(f"--save_statistics: {_REFERENCE.value} holds statistics already; give --reference=IMAGES")
    if _SAVE_STATISTICS.value and (len(compared) < 2 or not _SAVE_STATISTICS.value.endswith(".npz")):
        raise UserError(f"--save_statistics={_SAVE_STATISTICS.value}: needs a name that ends in .npz and two images or more")
    if images and compared and images.shape != compared.shape:
        sizes = ["x".join(map(str, which.shape)) for which in (images, compared)]
        raise UserError(
            f"--images are {sizes[0]} and --reference is {sizes[1]}: one size is compared; folder:PATH scales and crops"
        )
    return images, Reference(compared, statistics, count)


def parse_size() -> tuple[int, int, int] | None:
    if not _SIZE.value:
        return None
    try:
        numbers = [int(n) for n in _SIZE.value]
        height, width, channels = {1: [*numbers * 2, 3], 2: [*numbers, 3], 3: numbers}[len(numbers)]
    except (ValueError, KeyError):
        height = width = channels = 0
    if min(height, width) < 1 or channels not in (1, 3):
        raise UserError(
            f"--size={','.join(_SIZE.value)}: give pixels, SIDE or HEIGHT,WIDTH or HEIGHT,WIDTH,CHANNELS, the latter 1 or 3"
        )
    return height, width, channels


def choose_metrics(images: Images, reference: Reference) -> list[str]:
    """--metrics, or all that can be computed.

    Raises:
      UserError: one is unknown or cannot be computed, or there are too few images for it.
    """
    asked = dict.fromkeys(_METRICS.value or METRICS)
    if unknown := [name for name in asked if name not in METRICS]:
        raise UserError(f"--metrics: unknown {', '.join(unknown)}; choose of {', '.join(METRICS)}")
    obstacles = {name: obstacle(METRICS[name], reference) for name in asked}
    if _METRICS.value and (found := [f"{name} needs {why}" for name, why in obstacles.items() if why]):
        raise UserError(f"--metrics: {found[0]}")
    chosen = [name for name, why in obstacles.items() if not why]
    for name in chosen:
        least = {"is": _IS_SPLITS.value, "kid": _KID_SUBSET_SIZE.value or 2, "pr": _PR_NEIGHBOURS.value + 1}.get(name, 2)
        counts = {"--images": len(images)}
        if METRICS[name].reference or (METRICS[name].moments and not reference.statistics):
            counts["--reference"] = len(reference.images)
        for flag, count in counts.items():
            if count < least:
                raise UserError(f"{name} needs at least {least} images, and {flag} has {count}; give more, or fewer --metrics")
    return chosen


def obstacle(metric: Metric, reference: Reference) -> str | None:
    """What a metric needs that is not there."""
    if _FEATURES.value == "pixels" and metric.outputs != {"pool"}:
        return "--features=inception"
    if metric.reference and not reference.images:
        return f"the reference's images, and {_REFERENCE.value} holds only statistics"
    if metric.moments and reference.statistics and metric.moments not in reference.statistics:
        return f"mu_s and sigma_s, which {_REFERENCE.value} does not hold"
    return None


def gather(
    name: str, images: Images | None, extractor: Pixels | Inception, mesh: Mesh, moments: set[str | None], arrays: set[str | None]
) -> Collected:
    """See training/features.py; with a progress bar, and without looking at images of which nothing is wanted."""
    moments, arrays = moments - {None}, arrays - {None}
    if not images or not moments | arrays:
        return Collected({}, {})
    batch_size = _BATCH_SIZE.value + -_BATCH_SIZE.value % sharding.batch_devices(mesh)
    with tqdm(total=len(images), desc=name, unit="image", disable=jax.process_index() != 0) as bar:
        return collect(images, extractor, moments, arrays, batch_size=batch_size, threads=_THREADS.value, bar=bar)


def measure(name: str, images: Collected, reference: Collected, statistics: dict[str, Gaussian]) -> dict[str, float]:
    """The numbers of one metric."""
    metric = METRICS[name]
    if metric.moments:
        return {name: frechet_distance(images.moments[metric.moments].gaussian(), statistics[metric.moments])}
    ours = images.arrays[metric.images]
    if name == "is":
        order = np.random.default_rng(_SEED.value).permutation(len(ours))
        return dict(zip(("is", "is_std"), inception_score(ours[order], _IS_SPLITS.value), strict=True))
    theirs = reference.arrays[metric.reference]
    if name == "kid":
        options = {"subsets": _KID_SUBSETS.value, "subset_size": kid_subset_size(len(ours), len(theirs)), "seed": _SEED.value}
        return dict(zip(("kid", "kid_std"), kernel_distance(ours, theirs, **options), strict=True))
    return dict(zip(("precision", "recall"), precision_recall(theirs, ours, _PR_NEIGHBOURS.value), strict=True))


def kid_subset_size(*counts: int) -> int:
    return _KID_SUBSET_SIZE.value or min(1000, *counts)


def report(
    values: dict[str, float], images: Images, reference: Reference, extractor: Pixels | Inception, out: Path | None, devices: int
) -> None:
    """Prints a table, and writes --out."""
    count = "an unknown number of" if reference.count is None else reference.count
    print(f"{_IMAGES.value}: {len(images)} images; {_REFERENCE.value}: {count} images; {extractor.name} features")
    for name, value in values.items():
        print(f"  {name:<10} {value:.6g}")
    dimension = extractor.outputs["pool"]
    if {"fid", "sfid"} & values.keys() and min(len(images), reference.count or dimension + 1) <= dimension:
        print(f"note: a Fréchet distance of no more images than features ({dimension}) is far too large; compare equal n only")
    if not out:
        return
    settings = {
        "batch_size": _BATCH_SIZE.value,
        "seed": _SEED.value,
        "is_splits": _IS_SPLITS.value,
        "kid_subsets": _KID_SUBSETS.value,
        "kid_subset_size": kid_subset_size(len(images), len(reference.images)) if "kid" in values else None,
        "pr_neighbours": _PR_NEIGHBOURS.value,
    }
    record = {
        "images": {"from": _IMAGES.value, "n": len(images), "shape": list(images.shape)},
        "reference": {
            "from": _REFERENCE.value,
            "n": reference.count,
            "images": len(reference.images) if reference.images else 0,
            "statistics": sorted(reference.statistics),
        },
        "features": extractor.name,
        "inception": extractor.identity,
        "metrics": values,
        "settings": settings,
        "devices": devices,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    files.write_new(out, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"settings and numbers in {out}")


def check_statistics(reference: Reference, outputs: dict[str, int]) -> None:
    """Raises a UserError unless the statistics are of as many features as the extractor has."""
    for name, gaussian in reference.statistics.items():
        if len(gaussian.mean) != outputs.get(name):
            raise UserError(
                f"--reference={_REFERENCE.value} has a mean of {len(gaussian.mean)} features and --features={_FEATURES.value}"
                f" makes {outputs.get(name)}; give statistics of the same features"
            )


if __name__ == "__main__":
    cli.run(evaluate)
