"""Lists the image files of a directory, without a look into any."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from speedit_jax import storage
from speedit_jax.data.images import suffixes
from speedit_jax.data.names import printable
from speedit_jax.errors import UserError

# What operating systems, storage boxes and editors leave beside images; so are all hidden names.
_SYSTEM_DIRECTORIES = {
    *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot", "__macosx", "__pycache__"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "network trash folder", "temporary items"),
}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
# What data/captions.py reads without being told where: tables, and NAME.txt beside NAME.png.
CAPTION_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_SUFFIX = ".txt"
_NO_FILE = "no file"  # links to nothing, sockets and the like
_PATIENCE = 2.0  # seconds until a bar appears


def progress(what: str, total: int | None = None) -> tqdm:
    """A bar for listing and reading files, on stderr, that appears only where it takes seconds."""
    return tqdm(desc=what, total=total, unit=" files", delay=_PATIENCE, leave=False)


class Scan:
    """Lists below `root`; names are relative to it, with "/" between.

    Attributes:
      left_out: how many files were not taken, by suffix; files of systems and of captions are not counted.
    """

    def __init__(self, root: Path):
        self.root = root
        self.left_out: Counter[str] = Counter()
        self._bar = progress(f"listing {printable(root)}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def directory(self, name: str = "") -> tuple[list[str], list[str], list[str]]:
        """(directories, images, other files) in one directory, each sorted.

        Raises:
          UserError: it cannot be listed.
        """
        directories, images, others, kinds = [], [], [], {}
        for entry in self._entries(name):
            below = f"{name}/{entry.name}" if name else entry.name
            suffix = os.path.splitext(entry.name)[1].lower()
            kind = _kind(entry)
            if kind == "directory":
                if entry.name.casefold() not in _SYSTEM_DIRECTORIES:
                    directories.append(below)
            elif kind == "file" and suffix in suffixes():
                images.append(below)
            elif entry.name.casefold() not in _SYSTEM_FILES:
                others.append(below)
                kinds[below] = suffix if kind == "file" else kind
        captioned = {os.path.splitext(name)[0] + CAPTION_SUFFIX for name in images}
        tables = {f"{name}/{table}".lstrip("/") for table in CAPTION_TABLES}
        self.left_out.update(kind for other, kind in kinds.items() if other not in captioned | tables)
        return sorted(directories), sorted(images), sorted(others)

    def _entries(self, name: str) -> Iterator[os.DirEntry]:
        try:
            with storage.scan(self.root / name) as entries:
                for entry in entries:
                    self._bar.update()
                    if not entry.name.startswith("."):
                        yield entry
        except OSError as e:
            raise UserError(f"cannot list the directory {printable(self.root / name)}: {storage.reason(e)}") from e

    def below(self, name: str = "") -> list[str]:
        """All images below a directory, sorted. Links are followed, and each directory is entered once."""
        start = storage.resolved(self.root / name)
        # What contains it would be a loop.
        entered = {_identity(directory) for directory in start.parents}
        found, todo, links = [], [name], []
        while todo or links:
            # Links come last, so that a directory below goes by its own name.
            current = todo.pop() if todo else links.pop(0)
            if (identity := _identity(self.root / current)) in entered:
                continue
            entered.add(identity)
            directories, images, _ = self.directory(current)
            found += images
            for directory in directories:
                (links if storage.is_link(self.root / directory) else todo).append(directory)
            links.sort()
        return sorted(found, key=lambda path: path.split("/"))


def _kind(entry: os.DirEntry) -> str:
    try:
        return "directory" if entry.is_dir() else "file" if entry.is_file() else _NO_FILE
    except OSError:  # a link to itself
        return _NO_FILE


def _identity(directory: Path) -> tuple[int, int] | str:
    if storage.is_remote(directory):
        return str(directory)
    stat = os.stat(directory)
    return stat.st_dev, stat.st_ino


def count_by_suffix(left_out: Counter[str], most: int = 8) -> str:
    """'12 .heic, 1 without a suffix', the most frequent first."""
    special = {"": "without a suffix", _NO_FILE: "broken links"}
    counted = sorted((-n, special.get(suffix, printable(suffix))) for suffix, n in left_out.items())
    shown = [f"{-n:,} {kind}" for n, kind in counted[:most]]
    rest = -sum(n for n, _ in counted[most:])
    return ", ".join(shown) + (f" and {rest:,} others" if rest else "")
