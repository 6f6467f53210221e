"""Checks a data set before training: decodes every image and says what is wrong and what is in it.

  python -m speedit_jax.check_data --source=folder:/path/to/images --size=256
  python -m speedit_jax.check_data --source=tfds:oxford_flowers102 --out=report.json

Reads images exactly as training does. Lists the files that cannot be read, the first 20 on screen and all in --out, the
classes with their numbers of images, sizes, modes, files that are the same to the byte, colour profiles that cannot be used, and
what a folder holds besides images. The exit code is 1 if an image cannot be read. Latents are checked by
python -m speedit_jax.encode --verify.
"""

import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool

import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from speedit_jax import __version__, cli, storage
from speedit_jax.data.classes import describe
from speedit_jax.data.folder import FolderSource
from speedit_jax.data.images import open_image, parse_background
from speedit_jax.data.pixels import flatten
from speedit_jax.data.sources import Source, open_source
from speedit_jax.data.tfds import TfdsSource
from speedit_jax.errors import UserError

_SOURCE = flags.DEFINE_string("source", None, "folder:PATH, tfds:NAME, digits or synthetic, as config.data.source.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of a tfds data set or of digits, as config.data.split.")
_CLASSES = flags.DEFINE_string("classes", "", "Only these classes, as config.data.classes.")
_SIZE = flags.DEFINE_list("size", None, "Image size in training, SIDE or HEIGHT,WIDTH; smaller images are counted.")
_BACKGROUND = flags.DEFINE_string("background", "white", "Colour behind transparent parts, as config.data.background.")
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Where to write the full report as JSON.")

SHOWN = 20  # lines of each kind on screen


@dataclasses.dataclass(frozen=True)
class Found:
    """What one image file is.

    Attributes:
      error: why it cannot be read; all else is then unknown.
      size: (height, width) in pixels.
      kind: Pillow's format and mode: "PNG RGBA".
      profile: why its colour profile cannot be used.
      content: a checksum of the file.
    """

    error: str | None = None
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    profile: str | None = None
    content: bytes = b""


def check_data() -> int | None:
    if not _SOURCE.value:
        raise UserError("--source is missing; --help has examples")
    if _SOURCE.value.startswith("latents:"):
        raise UserError(f"--source={_SOURCE.value}: python -m speedit_jax.encode --verify --out=DIRECTORY checks latents")
    size = cli.pair(_SIZE, cli.PIXELS) if _SIZE.value else None
    out = storage.path(_OUT.value) if _OUT.value else None
    if out:
        storage.check_writable(out)
    source = open_images()
    has_files = isinstance(source, FolderSource | TfdsSource)
    if ignored := [flag for flag in (_SIZE, _BACKGROUND, _OUT) if flag.value != flag.default and not has_files]:
        value = ignored[0].value if isinstance(ignored[0].value, str) else ",".join(ignored[0].value)
        raise UserError(f"--{ignored[0].name}={value}: {_SOURCE.value} is made here and has no files to report on; leave it out")
    print(f"{_SOURCE.value}: {len(source):,} images")
    print("\n".join(describe(source)), flush=True)
    if not has_files:
        print(f"made here, {'x'.join(map(str, source.image_shape))}: no files that could be damaged")
        return None
    report = summarize(source, examine_all(source), size)
    show(report)
    if out:
        storage.write_new(out, lambda partial: storage.write_json(partial, report))
        print(f"all of it in {out}")
    return 1 if report["unreadable"] else None


def open_images() -> Source:
    """The source; its images are never scaled here, so their shape does not matter."""
    shape = (8, 8, 1) if _SOURCE.value == "digits" else (1, 1, 3)
    keys = dict(zip(("height", "width", "channels"), shape, strict=True))
    other = {"split": _SPLIT.value, "classes": _CLASSES.value, "background": _BACKGROUND.value, "max_broken": 0}
    synthetic = {"synthetic_size": 4096, "synthetic_classes": 10}
    return open_source(ml_collections.ConfigDict({"source": _SOURCE.value} | keys | other | synthetic))


def examine_all(source: FolderSource | TfdsSource) -> Iterator[Found]:
    """One `Found` an image, in order."""
    background = parse_background(_BACKGROUND.value)

    def examine(index: int) -> Found:
        try:
            content = source.encoded(index)
        except OSError as e:
            return Found(error=storage.reason(e))
        try:
            with open_image(io.BytesIO(content)) as image:
                kind = f"{image.format} {image.mode}"
                flat, fault = flatten(image, 3, background)
            return Found(None, flat.size[::-1], kind, fault, hashlib.blake2b(content, digest_size=16).digest())
        except Exception as e:
            # Pillow raises many kinds for many kinds of damage.
            return Found(error=" ".join(str(e).split()) or type(e).__name__)

    with ThreadPool(_THREADS.value) as pool:
        yield from tqdm(pool.imap(examine, range(len(source)), chunksize=8), "checking", len(source), unit=" images", leave=False)


def summarize(source: FolderSource | TfdsSource, found: Iterator[Found], size: tuple[int, int] | None) -> dict:
    """All that --out holds; names are written as they print."""
    unreadable, broken_profiles, sizes, kinds, copies = [], [], [], Counter(), {}
    for index, one in enumerate(found):
        if one.error:
            unreadable.append({"image": source.name_of(index), "error": one.error})
            continue
        copies.setdefault(one.content, []).append(index)
        sizes.append(one.size)
        kinds[one.kind] += 1
        if one.profile:
            broken_profiles.append({"image": source.name_of(index), "error": one.profile})
    duplicates = [[source.name_of(i) for i in same] for same in copies.values() if len(same) > 1]
    report = {
        "source": _SOURCE.value,
        "images": len(source),
        "notes": list(getattr(source, "notes", ())),
        "unreadable": unreadable,
        "kinds": dict(kinds.most_common()),
        "duplicates": duplicates,
        "broken_profiles": broken_profiles,
        "left_out": dict(getattr(source, "left_out", {})),
        "versions": {"speedit_jax": __version__},
    }
    labels = getattr(source, "labels", None)
    if labels is not None and source.class_names:
        counts = np.bincount(labels, minlength=len(source.class_names)).tolist()
        report["class_counts"] = dict(zip(source.class_names, counts, strict=True))
    if sizes:
        table = np.array(sizes)
        for axis, name in enumerate(("height", "width")):
            values = table[:, axis]
            report[name] = {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
        if size:
            report["size"], report["smaller"] = list(size), int((table < size).any(axis=1).sum())
    return report


def show(report: dict) -> None:
    for axis in ("height", "width"):
        if axis in report:
            print("{}: {min} to {max} pixels, median {median:g}".format(axis, **report[axis]))
    if "smaller" in report:
        print(f"smaller than {'x'.join(map(str, report['size']))}, to be enlarged: {report['smaller']:,}")
    print("kinds: " + ", ".join(f"{n:,} {kind}" for kind, n in report["kinds"].items()))
    show_list(
        "colour profiles that cannot be used and are ignored",
        [f"{one['image']}: {one['error']}" for one in report["broken_profiles"]],
    )
    show_list("groups of files that are the same to the byte", [", ".join(group[:5]) for group in report["duplicates"]])
    show_list("images that cannot be read", [f"{one['image']}: {one['error']}" for one in report["unreadable"]])
    if not report["unreadable"]:
        print("all images can be read")


def show_list(what: str, lines: list[str]) -> None:
    """A heading and the first lines; nothing where there are none."""
    if lines:
        print(f"{what}: {len(lines):,}")
        print("\n".join(f"  {line}" for line in lines[:SHOWN]))
        if len(lines) > SHOWN:
            print(f"  and {len(lines) - SHOWN:,} more" + ("" if _OUT.value else "; --out=FILE lists all"))


if __name__ == "__main__":
    cli.run(check_data)
