"""folder:PATH: images below a directory, labelled by their directories or by a dataset.json."""

import dataclasses
import functools
import itertools
import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speedit_jax import storage
from speedit_jax.data import dataset_json
from speedit_jax.data.classes import choose, relabel
from speedit_jax.data.identity import fingerprints
from speedit_jax.data.images import check_channels, read_image
from speedit_jax.data.names import printable
from speedit_jax.data.pixels import WHITE
from speedit_jax.data.scan import CAPTION_TABLES, Scan, count_by_suffix
from speedit_jax.errors import UserError

_SPLIT = re.compile(  # train, val, test_set, train2017, images_train, trainA
    r"(images?[-_ ])?(train|training|val|valid|validation|test|testing|dev|eval)([-_ ]?(set|data|split|images?|\d{4}|[ab]))*"
)
_FOR_CAPTIONS = " here (speedit_jax.encode_text reads captions from it)"
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")  # in which labels might be


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded, cropped and scaled when asked for.

    A file that cannot be decoded is named, once, and the next one that can stands in for it, the same at every run; more than
    `max_broken` of them are an error.

    Attributes:
      files: relative to root, with "/" between.
      class_names: as text that prints, whatever bytes the directories' names are.
      left_out: how many files were not taken, by suffix.
      notes: lines about the classes that a person should read before training.
      by_table: whether dataset.json holds the labels.
      broken: numbers of the files for which the next one stands in, at most `max_broken`.
    """

    encoded_by = None
    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    max_broken: int = 0
    background: tuple[int, int, int] = WHITE
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    by_table: bool = False
    broken: set[int] = dataclasses.field(default_factory=set, compare=False)

    @functools.cached_property
    def _fingerprints(self) -> tuple[str, str]:
        return fingerprints(self.root, self.files, self.labels)

    @property
    def fingerprint(self) -> str:
        """Of names, labels and content (data/identity.py). The first call opens every file."""
        return self._fingerprints[0]

    @property
    def older_fingerprints(self) -> tuple[str, ...]:
        """What earlier versions called the same data: names and sizes. They did not read dataset.json."""
        return () if self.by_table else self._fingerprints[1:]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        for i in (i % len(self) for i in range(index, index + len(self))):
            # Once broken it stays so, though it may be readable again: what is joined to records goes by `broken`.
            if i not in self.broken:
                try:
                    return self._decode(i)
                except UserError as e:
                    self._count(i, e)
        raise UserError(f"no image in {printable(self.root)} can be read")

    def encoded(self, index: int) -> bytes:
        """The file as it is."""
        return (self.root / self.files[index]).read_bytes()

    def name_of(self, index: int) -> str:
        return printable(self.files[index])

    def _count(self, index: int, error: UserError) -> None:
        count = len(self.broken | {index})
        if count > self.max_broken:
            limit = f" ({count} broken files, data.max_broken={self.max_broken})" if self.max_broken else ""
            raise UserError(f"{error}{limit}") from error
        if index not in self.broken:
            self.broken.add(index)
            tqdm.write(f"warning: {error}; using the next image instead", file=sys.stderr)

    def _decode(self, index: int) -> dict[str, np.ndarray]:
        path = self.root / self.files[index]
        try:
            image = read_image(path, self.image_shape, self.background)
        except Exception as e:
            # Pillow raises many kinds for many kinds of damage; to the user they are one.
            raise UserError(
                f"cannot read the image {printable(path)}: {e}; repair it or remove it from the folder"
                " (python -m speedit_jax.check_data lists all such files)"
            ) from e
        return {"image": image, "label": np.int32(self.labels[index])}


def open_folder(
    root: Path, image_shape: tuple[int, int, int], max_broken: int, wanted: str, background: tuple[int, int, int]
) -> FolderSource:
    """The images below `root`.

    Their classes are those of dataset.json; without one the sub-directories; without any there are none.

    Args:
      image_shape: (H, W, C) to scale and crop to.
      max_broken: files that may be undecodable.
      wanted: the classes to take, as in data.classes.
      background: the colour behind transparent parts, 0..255.

    Raises:
      UserError: there is no such directory, it has no images, or it does not say what the classes are.
    """
    where = f"data.source=folder:{printable(root)}"
    if not root.is_dir():
        raise UserError(f"{where}: {_no_directory(root)}")
    check_channels(image_shape[2])
    with Scan(root) as scan:
        table = dataset_json.read_labels(root)
        if table is None:
            files, labels, classes, notes = _by_directory(scan, wanted, where)
        else:
            files, labels, classes, notes = _by_table(scan, table, wanted, where)
    return FolderSource(
        root=root,
        files=tuple(files),
        labels=tuple(labels),
        class_names=tuple(printable(name) for name in classes),
        image_shape=image_shape,
        max_broken=max_broken,
        background=background,
        left_out=scan.left_out,
        notes=tuple(notes),
        by_table=table is not None,
    )


def check_apart(source: Any, out: Path, flag: str) -> None:
    """Raises a UserError for a new directory, of this flag, that would be a class of a folder when that is opened again."""
    if not isinstance(source, FolderSource) or source.by_table:
        return
    root, place = storage.resolved(source.root), storage.resolved(out)
    first = place.relative_to(root).parts[:1] if place.is_relative_to(root) else ()
    # With what is there already it was opened.
    if first and not first[0].startswith(".") and not (root / first[0]).exists():
        raise UserError(
            f"--{flag}={out} is in {printable(source.root)}, whose sub-directories are classes: choose a directory elsewhere"
        )


def _no_directory(root: Path) -> str:
    if not root.is_file():
        return "no such directory"
    if not storage.is_remote(root) and (zipfile.is_zipfile(root) or tarfile.is_tarfile(root)):
        return "an archive; unpack it, and give the directory"
    return "a file; give the directory that holds the images"


def _by_directory(scan: Scan, wanted: str, where: str) -> tuple[list[str], list[int], list[str], list[str]]:
    """(files, their labels, class names, notes)."""
    directories, loose, others = scan.directory()
    if directories and loose:
        raise UserError(
            f"{where}: {printable(loose[0])} and {len(loose) - 1} more images lie next to the class folders; move them into one"
        )
    splits = [name for name in directories if _SPLIT.fullmatch(name.casefold())]
    if not wanted and splits and (len(splits) > 1 or len(splits) == len(directories)):
        first = next((name for name in splits if "train" in name.casefold()), splits[0])
        raise UserError(
            f"{where}: are {', '.join(map(printable, splits[:3]))} parts of a data set? For one part, give"
            f" folder:{printable(scan.root / first)}; if they are classes, say so with"
            f" data.classes={','.join(map(printable, directories))[:200]}"
        )
    tables = [name for name in others if name.lower().endswith(_TABLES)]
    hint = [_how_to_label(tables)] if len(directories) < 2 else []
    if not directories:
        if wanted:
            raise UserError(f"data.classes={wanted}: this data set has no classes: {hint[0]}")
        if not loose:
            raise UserError(f"{where}: {_no_images(scan.root)}")
        return loose, [0] * len(loose), [], hint
    names = [printable(name) for name in directories]
    classes = [directories[number] for number in choose(tuple(names), wanted)]
    files, labels = [], []
    for label, name in enumerate(classes):
        found = scan.below(name)
        if not found:
            raise UserError(f"{where}: {_no_images(scan.root / name)}")
        files += found
        labels += [label] * len(found)
    return files, labels, classes, hint + ([] if wanted else _numbers_as_text(classes))


def _by_table(scan: Scan, table: dict[str, int], wanted: str, where: str) -> tuple[list[str], list[int], list[str], list[str]]:
    """(files, their labels, class names, notes), by dataset.json."""
    files = scan.below()
    scan.left_out[".json"] -= 1  # the table itself
    scan.left_out = +scan.left_out
    if not files:
        raise UserError(f"{where}: {_no_images(scan.root)}")
    if not table:
        choose((), wanted)
        return files, [0] * len(files), [], [f"{dataset_json.NAME} has no labels, so there are no classes"]
    unlabelled = [name for name in files if name not in table]
    if unlabelled:
        raise UserError(
            f"{where}: {dataset_json.NAME} has no label for {printable(unlabelled[0])} and {len(unlabelled) - 1} more"
        )
    names = [str(number) for number in range(max(table.values()) + 1)]
    chosen = choose(tuple(names), wanted)
    indices, labels = relabel(np.array([table[name] for name in files]), chosen)
    if not len(indices):
        raise UserError(f"{where}: no images of data.classes={wanted}")
    missing = len(table) - len(files)
    notes = [f"labels are those of {dataset_json.NAME}" + (f", {missing:,} of whose files are not there" if missing else "")]
    return [files[i] for i in indices], labels.tolist(), [names[number] for number in chosen], notes


def _no_images(directory: Path) -> str:
    with Scan(directory) as scan:
        scan.below()
    counted = f", but {count_by_suffix(scan.left_out)}" if scan.left_out else ""
    return f"no images in {printable(directory)} (.png, .jpg, .webp and whatever else Pillow reads){counted}"


def _how_to_label(tables: list[str]) -> str:
    read = f"{printable(tables[0])} is not read{_FOR_CAPTIONS if tables[0] in CAPTION_TABLES else ''}; " if tables else ""
    return (
        f"{read}for classes, move the images of each into a sub-directory of its own, or write {dataset_json.NAME}:"
        ' {"labels": [["FILE", NUMBER], ...]}'
    )


def _numbers_as_text(classes: list[str]) -> list[str]:
    if not all(name.isdecimal() for name in classes):
        return []
    for first, second in itertools.pairwise(classes):
        if int(first) > int(second):
            return [
                f"warning: the classes are numbers in the order of text, {first} before {second}: label {classes.index(second)}"
                f" is class {second}"
            ]
    return []
