"""Evaluates images: FID, sFID, KID, precision and recall, match of texts; without a reference, IS and CLIP score.

  python -m speedit_jax.evaluate --images=runs/digits/new.npz --reference=digits --features=pixels
  python -m speedit_jax.evaluate --images=samples.npz --reference=folder:/path/to/images --inception=FILE.pth --out=fid.json
  python -m speedit_jax.evaluate --reference=folder:/path/to/images --size=256 --inception=FILE.pth --save_statistics=ref.npz

--images and --reference are FILE.npz with arr_0 (uint8 [n, H, W, C], as sample and ADM write it), a directory of images,
folder:PATH or tfds:NAME (scaled and cropped as in training), digits or synthetic; --reference may also be an npz of ADM's
statistics.
docs/evaluation.md says what the numbers are, and what makes them comparable.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from speedit_jax import __version__, cli, sharding, storage
from speedit_jax.config import LARGEST_SEED
from speedit_jax.data.image_sets import KINDS, Images, open_images
from speedit_jax.encoders.clip import ClipEncoder
from speedit_jax.errors import UserError
from speedit_jax.evaluation.comparison import (
    FEATURES,
    METRICS,
    NO_REFERENCE,
    ON_TEXT,
    Extractor,
    Options,
    Reference,
    choose_metrics,
    crop_of,
    extract_features,
    make_extractor,
    measure,
    measure_clip,
    open_reference,
)
from speedit_jax.evaluation.matching import Texts, read_texts
from speedit_jax.metrics.statistics_file import STATISTICS, write_statistics

_IMAGES = flags.DEFINE_string(
    "images", None, "Images to evaluate: FILE.npz, a directory, folder:PATH, tfds:NAME, digits or synthetic."
)
_REFERENCE = flags.DEFINE_string("reference", None, "What to compare with: images, or an npz with mu and sigma.")
_METRICS = flags.DEFINE_list(
    "metrics",
    None,
    "Any of fid, sfid, is, kid, pr, match and clip, separated by commas. Default: all but match and clip that the features and"
    " the reference allow.",
)
_CAPTIONS = flags.DEFINE_string(
    "captions", "auto", "For match, where the captions of --reference are: auto, metadata, a suffix, or a table or COCO's JSON."
)
_CLIP = flags.DEFINE_string("clip", None, "For clip, a directory of a CLIP as transformers stores it.")
_FEATURES = flags.DEFINE_enum("features", "inception", FEATURES, "inception, or pixels for tiny images (needs no weights).")
_INCEPTION = flags.DEFINE_string("inception", None, "Weights of FID's Inception-v3: .pth, .safetensors or .npz.")
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers and all settings, JSON.")
_SAVE_STATISTICS = flags.DEFINE_string(
    "save_statistics", None, "Where to write the statistics of the reference, an npz in ADM's format."
)
_SPLIT = flags.DEFINE_string("split", "train", "Split of --reference, for digits (train, held_out) and tfds, as data.split.")
_SIZE = flags.DEFINE_list(
    "size", None, "Image size for folder:, tfds: and synthetic: SIDE, or HEIGHT,WIDTH[,CHANNELS]. Default: the size of --images."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Batch size over all devices.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=0)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of KID's subsets and of the shuffle before the Inception Score's splits.",
    lower_bound=0,
    upper_bound=LARGEST_SEED,
)
_IS_SPLITS = flags.DEFINE_integer("is_splits", Options.is_splits, "Parts of the Inception Score.", lower_bound=1)
_KID_SUBSETS = flags.DEFINE_integer("kid_subsets", Options.kid_subsets, "Random subsets for KID.", lower_bound=1)
_KID_SUBSET_SIZE = flags.DEFINE_integer(
    "kid_subset_size", None, "Images per KID subset. Default: 1000, or all if there are fewer.", lower_bound=2
)
_PR_NEIGHBOURS = flags.DEFINE_integer("pr_neighbours", Options.pr_neighbours, "k of precision and recall.", lower_bound=1)

_SAMPLED = ("checkpoint_step", "weights", "sampler", "num_steps", "guidance_scale")  # of sample's settings


def evaluate() -> None:
    if not _REFERENCE.value and (_SAVE_STATISTICS.value or any(METRICS[name].compares for name in asked_metrics())):
        raise UserError("--reference is missing; --help has examples. --metrics=is needs none, nor does --metrics=clip")
    if not _IMAGES.value and not _SAVE_STATISTICS.value:
        raise UserError("--images is missing; or give --save_statistics=FILE.npz, for the reference's statistics alone")
    check_ignored()
    out, save = (storage.path(flag.value) if flag.value else None for flag in (_OUT, _SAVE_STATISTICS))
    check_outputs(out, save)
    images, reference = open_both()
    options = Options(_SEED.value, _IS_SPLITS.value, _KID_SUBSETS.value, _KID_SUBSET_SIZE.value, _PR_NEIGHBOURS.value)
    names, texts = [], None
    if images and set(ON_TEXT) & set(_METRICS.value or ()):
        texts = read_texts(_METRICS.value, _IMAGES.value, images, reference.images, _CAPTIONS.value)
    if images:
        counted = ("--images", len(images))
        names = choose_metrics(_METRICS.value or (), counted, reference, _FEATURES.value, options, "--", texts)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    shape = (images or reference.images).shape
    sizes = {"batch_size": _BATCH_SIZE.value, "threads": _THREADS.value}
    clip = open_clip(mesh, texts) if "clip" in names else None
    extractor = None
    if names != ["clip"] or save:
        extractor = make_extractor(_FEATURES.value, shape, _INCEPTION.value, reference, mesh, "--")

    def gathered(name, images, moments, arrays):
        return extract_features(name, images, extractor, mesh, moments, arrays, **sizes)

    metrics = [METRICS[name] for name in names]
    moments = {metric.moments for metric in metrics}
    of_images = gathered("images", images, moments, {metric.images for metric in metrics})
    if reference.statistics:
        moments = set()
    elif save:
        moments = moments | (extractor.outputs.keys() & STATISTICS)
    of_reference = gathered("reference", reference.images, moments, {metric.reference for metric in metrics})
    statistics = reference.statistics or {name: sums.gaussian() for name, sums in of_reference.moments.items()}
    of_clip = measure_clip(clip, images, texts, mesh, **sizes) if clip else {}
    if jax.process_index() == 0:
        if save:
            write_statistics(save, statistics, extractor.name, reference.origin)
            print(f"statistics of {reference.count} images, {extractor.name} features, in {save}")
        if images:
            values = {}
            for name in tqdm(names, unit="metric", leave=False):
                values |= of_clip if name == "clip" else measure(name, of_images, of_reference, statistics, options, texts)
            report(values, images, reference, extractor, clip, options, out, mesh.size)
    if jax.process_count() > 1:
        # A process that ends waits five minutes for the others, and then all abort; some metrics take longer.
        multihost_utils.sync_global_devices("all is measured")


def check_ignored() -> None:
    """Raises a UserError for flags that nothing would look at."""
    for flag, metric in ((_CLIP, "clip"), (_CAPTIONS, "match")):
        if flag.value != flag.default and metric not in (_METRICS.value or ()):
            raise UserError(f"--{flag.name}={flag.value} is for --metrics={metric}, which is not asked for")
    kinds = {(flag.value or "").partition(":")[0] for flag in (_IMAGES, _REFERENCE)}
    if _SIZE.value and not kinds & {"folder", "tfds", "synthetic"}:
        raise UserError(f"--size={','.join(_SIZE.value)} is for folder:, tfds: and synthetic; others keep their own size")
    if _INCEPTION.value and _FEATURES.value == "pixels":
        raise UserError(f"--inception={_INCEPTION.value} has no effect with --features=pixels; leave one of them out")
    if _SPLIT.value != _SPLIT.default and not _REFERENCE.value:
        raise UserError(f"--split={_SPLIT.value} is that of --reference, which is not given")


def place_of(where: str) -> tuple[Path, Path]:
    """(the file or directory that images are opened from, where sample writes the settings of such images)."""
    place = storage.resolved(storage.path(where.removeprefix("folder:")))
    return place, place.parent / (place.name.removesuffix(".npz") + ".json")


def how_sampled() -> dict[str, Any]:
    """How sample drew --images, if it did: written down now, because other images may get their name."""
    try:
        settings = json.loads(place_of(_IMAGES.value)[1].read_text())
        return {"sampled": {name: settings[name] for name in _SAMPLED}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_outputs(out: Path | None, save: Path | None) -> None:
    """Raises a UserError for files that cannot be written, or that would replace what is measured, or each other."""
    kept = {}
    for flag in (_IMAGES, _REFERENCE):
        place, settings = place_of(flag.value or "")
        if flag.value and place.exists():
            kept |= {place: f"--{flag.name}", settings: f"the settings of --{flag.name}"}
    for flag, path in ((_OUT, out), (_SAVE_STATISTICS, save)):
        if not path:
            continue
        if storage.resolved(path) in kept:
            raise UserError(f"--{flag.name}={flag.value} would overwrite {kept[storage.resolved(path)]}; choose another file")
        kept[storage.resolved(path)] = f"--{flag.name}"
        storage.check_writable(path)


def open_clip(mesh: Mesh, texts: Texts) -> ClipEncoder:
    """What --clip names, and a line of the prompts that are too long for it."""
    if not _CLIP.value:
        raise UserError("--metrics: clip needs --clip=DIR, a directory of a CLIP as transformers stores it")
    try:
        clip = ClipEncoder(_CLIP.value, mesh)
    except UserError as e:
        raise UserError(f"--clip={_CLIP.value}: {e}") from e
    if cut := clip.too_long(texts.prompts):
        print(f"note: {len(cut)} prompts are cut at CLIP's {clip.length} tokens, the first of them {cut[0]!r}")
    return clip


def asked_metrics() -> list[str]:
    """Those of --metrics that exist; by default all. `choose_metrics` names the others."""
    return [name for name in _METRICS.value or METRICS if name in METRICS]


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
            raise UserError(f"--images={_IMAGES.value} has no arr_0, the name of pictures (latents are none); give {KINDS}")
        shape = shape or images.shape
    if not _REFERENCE.value:
        return images, NO_REFERENCE
    reference = open_reference(_REFERENCE.value, shape, _SPLIT.value, _FEATURES.value)
    compared, statistics = reference.images, reference.statistics
    if _SAVE_STATISTICS.value and statistics:
        raise UserError(f"--save_statistics: {_REFERENCE.value} holds statistics already; give --reference=IMAGES")
    if _SAVE_STATISTICS.value and (len(compared) < 2 or not _SAVE_STATISTICS.value.endswith(".npz")):
        raise UserError(
            f"--save_statistics={_SAVE_STATISTICS.value}: needs a file name that ends in .npz, and at least two images"
        )
    if images and compared and images.shape != compared.shape:
        sizes = ["x".join(map(str, which.shape)) for which in (images, compared)]
        raise UserError(
            f"--images are {sizes[0]} and --reference is {sizes[1]}: both must have the same size; use folder:PATH to"
            " scale and crop"
        )
    return images, reference


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


def report(
    values: dict[str, float],
    images: Images,
    reference: Reference,
    extractor: Extractor | None,
    clip: ClipEncoder | None,
    options: Options,
    out: Path | None,
    devices: int,
) -> None:
    """Prints a table, and writes --out."""
    count = "an unknown number of" if reference.count is None else reference.count
    against = f"; {reference.where}: {count} images" if reference.where else ""
    features = f"; {extractor.name} features" if extractor else ""
    print(f"{_IMAGES.value}: {len(images)} images{against}{features}{f'; {_CLIP.value}' if clip else ''}")
    for name, value in values.items():
        print(f"  {name:<10} {value:.6g}")
    dimension = extractor.outputs["pool"] if {"fid", "sfid"} & values.keys() else 0
    if min(len(images), reference.count or dimension + 1) <= dimension:
        print(
            f"note: with {dimension} images or fewer the Fréchet distance is biased upwards; compare only results with"
            " the same number of images"
        )
    # Samples do not tell how the images were cropped that their network was trained on.
    for note in reference.notes("centre" if crop_of(_IMAGES.value) == "centre" else None):
        print(note)
    if not out:
        return
    settings = {"batch_size": _BATCH_SIZE.value} | dataclasses.asdict(options)
    settings["kid_subset_size"] = options.subset_size(len(images), len(reference.images)) if "kid" in values else None
    record = {
        "images": {"from": _IMAGES.value, "n": len(images), "shape": list(images.shape)} | how_sampled(),
        "reference": {
            "from": reference.where,
            "n": reference.count,
            "shape": reference.origin.shape and list(reference.origin.shape),
            "crop": reference.origin.crop,
            "images": len(reference.images) if reference.images else 0,
            "statistics": sorted(reference.statistics),
        },
        "features": extractor and extractor.name,
        "inception": extractor and extractor.identity,
        "clip": clip and clip.identity,
        "metrics": values,
        "settings": settings,
        "devices": devices,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    storage.write_new(out, lambda partial: storage.write_json(partial, record))
    print(f"numbers and settings in {out}")


if __name__ == "__main__":
    cli.run(evaluate)
