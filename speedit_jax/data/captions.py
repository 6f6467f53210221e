"""The captions of a data set's images, as trainers and data sets write them.

metadata.jsonl   a line for each image: {"file_name": "0001.png", "text": "a cat"}; also metadata.csv and .parquet, with these two
                 columns; file_name is relative to the table, which may lie in any directory above the image (Hugging Face)
NAME.txt         beside NAME.png: a caption a line (kohya; suffixes other than .txt are possible)
FILE.json        COCO's: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}

An image may have several captions: rows with the same file_name, a list as text, lines, or annotations.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from speedit_jax import storage
from speedit_jax.data.names import printable
from speedit_jax.data.scan import CAPTION_SUFFIX, CAPTION_TABLES, Scan
from speedit_jax.errors import UserError
from speedit_jax.storage import first_line

_FILE, _TEXT = "file_name", "text"
_HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can write it, and it is not text
_WAYS = "metadata.jsonl, NAME.txt beside NAME.png, or --captions=FILE.json of COCO"


def read_captions(source: Any, where: str = "auto", max_missing: int | None = None) -> list[list[str]]:
    """The captions of each of a source's images, at least one; "" of an image without.

    Args:
      source: a `FolderSource`, or one that has `captions`.
      where: "auto", "metadata", a suffix such as ".txt", or the path of a table or of COCO's JSON.
      max_missing: how many images may be without, as --max_missing; None is none, where a command has no such flag.

    Raises:
      UserError: there are none, two kinds of them, images without, one that is no text, or a table names a file that is not
        there.
    """
    if not hasattr(source, "files"):
        if not hasattr(source, "captions"):
            raise UserError("this data set has no captions; choose folder:PATH or blobs")
        if where != "auto":
            raise UserError(f"--captions={where}: this data set has captions of its own")
        return source.captions
    found = _read(source.root, source.files, where)
    captions = [[text for text in map(_collapsed, found.get(name, ())) if text] for name in source.files]
    missing = [name for name, texts in zip(source.files, captions, strict=True) if not texts]
    if len(missing) == len(captions):
        raise UserError(f"no image in {printable(source.root)} has a caption; write {_WAYS}")
    if len(missing) > (max_missing or 0):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        flag = f"--max_missing={len(missing)}: such images are trained on as if their captions were dropped"
        allow = "" if max_missing is None else f", or allow {flag}"
        raise UserError(f"no caption for {printable(source.root / missing[0])}{more}; write one{allow}")
    for name, texts in zip(source.files, captions, strict=True):
        if half := next(filter(None, map(_HALF.search, texts)), None):
            raise UserError(
                f"a caption of {printable(source.root / name)} has half of a character, {ascii(half[0])[1:-1]}, as of a text"
                f" that is cut within an emoji: mend {ascii(half.string)[-100:]}"
            )
    return [texts or [""] for texts in captions]


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _read(root: Path, files: tuple[str, ...], where: str) -> dict[str, list[str]]:
    """{file: captions}."""
    if where.startswith(".") and "/" not in where:
        return _beside(root, files, where)
    if where not in ("auto", "metadata"):
        return _of_one_file(root, files, storage.path(where))
    tables = _tables(root, files)
    if where == "metadata":
        if not tables:
            raise UserError(f"--captions=metadata: there is no {', '.join(CAPTION_TABLES)} in {printable(root)}")
        return _of_tables(root, tables)
    beside = _beside(root, files, CAPTION_SUFFIX)
    if tables and beside:
        text = Path(next(iter(beside))).with_suffix(CAPTION_SUFFIX)
        raise UserError(
            f"captions are in {printable(tables[0])} and in {printable(text)}; say which with --captions=metadata or"
            f" --captions={CAPTION_SUFFIX}"
        )
    return _of_tables(root, tables) if tables else beside


def _directories(files: Iterable[str]) -> list[str]:
    """Those of the files and all above, as they are written in files: "" is the root."""
    found = {""}
    for name in files:
        parts = name.split("/")[:-1]
        found |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    return sorted(found)


def _tables(root: Path, files: tuple[str, ...]) -> list[str]:
    """metadata.* of all directories, relative to root."""
    found = []
    for directory in _directories(files):
        here = [f"{directory}/{table}".lstrip("/") for table in CAPTION_TABLES if (root / directory / table).is_file()]
        if len(here) > 1:
            raise UserError(f"captions are in {printable(root / here[0])} and in {Path(here[1]).name}; keep one of them")
        found += here
    return found


def _beside(root: Path, files: tuple[str, ...], suffix: str) -> dict[str, list[str]]:
    """The lines of NAME.txt for each NAME.png that has one."""
    with Scan(root) as scan:
        there = {name for directory in {name.rpartition("/")[0] for name in files} for name in scan.directory(directory)[2]}
    found = {}
    for name in files:
        stem, dot, _ = name.rpartition(".")
        text = f"{stem if dot else name}{suffix}"
        if text in there:
            found[name] = _text(root / text).split("\n")
    return found


def _text(path: Path) -> str:
    """Lines end with "\\n" alone; str.splitlines would also end them at signs of text from web pages."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"{printable(path)} cannot be read as text in UTF-8 ({first_line(e)}); save it again") from e


def _of_one_file(root: Path, files: tuple[str, ...], path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise UserError(f"--captions={path}: no such file; choose auto, metadata, a suffix such as .txt, or a file")
    return _of_coco(files, path) if path.suffix == ".json" else _of_table(root, "", path)


def _of_tables(root: Path, tables: list[str]) -> dict[str, list[str]]:
    found = {}
    for table in tables:
        for name, texts in _of_table(root, table.rpartition("/")[0], root / table).items():
            found.setdefault(name, []).extend(texts)
    return found


def _of_table(root: Path, directory: str, path: Path) -> dict[str, list[str]]:
    """{file relative to root: captions}; names in the table are relative to `directory`."""
    kinds = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in kinds:
        raise UserError(f"--captions={printable(path)}: known are {', '.join(kinds)} and COCO's .json")
    found = {}
    for number, row in kinds[path.suffix](path):
        name, texts = row.get(_FILE), row.get(_TEXT)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{printable(path)}, row {number}: it needs {_FILE} and {_TEXT}, a caption or a list of captions; it has"
                f" {', '.join(str(key) for key, value in row.items() if value is not None) or 'nothing'}"
            )
        name = name.replace("\\", "/").removeprefix("./")
        if name.startswith("/"):
            raise UserError(
                f"{printable(path)}, row {number}: {_FILE} {printable(name)[:200]} begins at the root; write it relative to"
                f" {printable(root / directory)}"
            )
        name = "/".join(filter(None, (directory, name)))
        if name not in found and not _is_there(root / name):
            raise UserError(f"{printable(path)}, row {number}: {_FILE} {printable(name)[:200]} is not there")
        found.setdefault(name, []).extend(texts)
    return found


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a caption, longer than names may be, where a table has its columns the wrong way round
        return False


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"{printable(path)}, row {number}: not JSON ({e})") from e
        yield number, row if isinstance(row, dict) else {}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 1
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(_text(path))), 2):
            if any(further := row.pop(None, ())):  # what is left of a text after its first comma
                raise UserError(
                    f"{printable(path)}, row {number}: more columns than the first row has, {','.join(further)[:100]!r}; put"
                    ' "quotation marks" around a text with commas'
                )
            yield number, row
    except csv.Error as e:
        raise UserError(f"{printable(path)}, row {number + 1}: not CSV ({e}); is a quotation mark left open?") from e


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{printable(path)} needs pyarrow: pip install pyarrow, or write metadata.jsonl") from e
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as e:  # pyarrow's errors have no common class
        raise UserError(f"{printable(path)} cannot be read as parquet ({first_line(e)})") from e
    yield from enumerate(rows, 1)


def _of_coco(files: tuple[str, ...], path: Path) -> dict[str, list[str]]:
    """By COCO's names, which are those of files without their directories; images of which there is no file do not matter."""
    try:
        content = json.loads(_text(path))
        images = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(images[note["image_id"]], note["caption"]) for note in content["annotations"]]
        if not all(isinstance(part, str) for pair in pairs for part in pair):
            raise TypeError("a name or a caption is not a text")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{printable(path)} is not COCO's JSON of captions: images with id and file_name, annotations with image_id and"
            f" caption ({type(e).__name__}: {first_line(e)})"
        ) from e
    by_name = {}
    for name, text in pairs:
        by_name.setdefault(name, []).append(text)
    found, twice = {}, {}
    for name in files:
        short = name.rpartition("/")[2]
        texts = by_name.get(name, by_name.get(short))
        if texts is None:
            continue
        if name not in by_name and twice.setdefault(short, name) != name:
            raise UserError(f"{printable(path)}: {printable(short)} may be {printable(name)} or {printable(twice[short])}")
        found[name] = texts
    return found
