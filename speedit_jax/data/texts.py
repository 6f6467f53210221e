"""Captions on disk as what a text encoder made of them: encoded once, trained on many times (speedit_jax.encode_text).

00000-of-00003.array_record   record i: the captions of record i of the source. A uint16, how many; then for each a uint16, its
                              number of tokens n, and float16 [n, E]. One more record at the end is "", the null caption.
00000-of-00003.json           the shard's checksum, how many captions it has and the most tokens of one
captions.jsonl                the texts: a line for each record, a list
header.json                   describes the whole set; data/shards.py has the rest
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.data import shards
from speedit_jax.data.joined import JoinedSource, images_of
from speedit_jax.errors import UserError

_COUNT = np.dtype("<u2")
_TOKENS = np.dtype("<f2")  # 2^-11 of a number that a network normalises
_COMMAND = "speedit_jax.encode_text"
TEXTS = "captions.jsonl"
MULTIPLE = 8  # lengths are rounded up to it: shapes that accelerators like


def rounded(length: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-length // MULTIPLE) * MULTIPLE


def write_shard(path: Path, records: Iterable[list[np.ndarray]], name: Callable[[int], str]) -> dict[str, Any]:
    """Writes a shard of the captions of records, each [n, E], under a temporary name, then gives it its own.

    Args:
      name: index in the shard -> what an error calls that record.

    Returns:
      What the shard's JSON holds: records, sha256, captions, and longest: the most tokens of a caption.

    Raises:
      UserError: numbers that are not finite, or not in float16; the shard is not written then.
    """

    def write(partial):
        writer, count, captions, longest = shards.Writer(partial), 0, 0, 0
        try:
            for record in records:
                writer.write(_packed(record, name(count)))
                count, captions = count + 1, captions + len(record)
                longest = max(longest, *(len(tokens) for tokens in record))
        finally:
            writer.close()
        return count, {"captions": captions, "longest": longest}

    return shards.write_shard(path, write)


def _packed(record: list[np.ndarray], name: str) -> bytes:
    parts = [np.asarray(len(record), _COUNT).tobytes()]
    for tokens in record:
        with np.errstate(over="ignore"):  # said below, by name
            stored = np.asarray(tokens, _TOKENS)
        if not np.isfinite(stored).all():
            raise UserError(f"{name}: what the text encoder makes of its caption is not finite in float16; use another encoder")
        parts += [np.asarray(len(tokens), _COUNT).tobytes(), stored.tobytes()]
    return b"".join(parts)


def _unpacked(record: bytes, width: int) -> list[np.ndarray]:
    count, place, found = int(np.frombuffer(record, _COUNT, 1)[0]), _COUNT.itemsize, []
    for _ in range(count):
        tokens = int(np.frombuffer(record, _COUNT, 1, place)[0])
        place += _COUNT.itemsize
        found.append(np.frombuffer(record, _TOKENS, tokens * width, place).reshape(tokens, width))
        place += tokens * width * _TOKENS.itemsize
    return found


def texts_of(captions: Iterable[list[str]]) -> str:
    """The content of captions.jsonl."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in captions)


def check_same(directory: Path, saved: dict[str, Any], what: dict[str, Any]) -> None:
    """Whether shards of the encoding `saved` and of the encoding `what` may be mixed; both are contents of encoding.json.

    Raises:
      UserError: they may not.
    """
    old, new = _identity(saved), _identity(what)
    of_data = {key for key in old | new if key.startswith("data.") and key != "data.shard_size"}
    shards.check_same(directory, old, new, of_data, f"images or captions of {what['data']['source']} have changed")


def _identity(what: dict[str, Any]) -> dict[str, Any]:
    """What shards depend on; not where encoder and images lie."""
    left_out = {"text": "encoder", "data": "source"}
    return {f"{part}.{key}": value for part, name in left_out.items() for key, value in what.get(part, {}).items() if key != name}


def write_header(directory: Path, what: dict[str, Any], captions: list[list[str]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """captions.jsonl, then header.json: `what`, the shards' facts, how many captions there are and the most tokens of one."""
    storage.write_text(directory / TEXTS, texts_of(captions), shared=True)
    header = what | {
        "count": len(captions),
        "captions": sum(shard["captions"] for shard in facts) - 1,  # without the null caption
        "longest": max(shard["longest"] for shard in facts),
        "texts": storage.sha256(directory / TEXTS),
        "shards": shards.named(facts),
    }
    storage.write_json(directory / shards.HEADER, header, shared=True)
    return header


@dataclasses.dataclass(frozen=True)
class TextStore:
    """The encoded captions of a data set.

    Attributes:
      directory: where they are.
      header: all of header.json.
    """

    directory: Path
    header: dict[str, Any]
    records: Any

    @property
    def identity(self) -> dict[str, Any]:
        """Of the text encoder, as encoders/text_encoder.py has it."""
        return self.header["text"]

    @property
    def width(self) -> int:
        """E, of a token."""
        return self.header["width"]

    @property
    def pooled(self) -> bool:
        """Whether each caption is one vector, and not its tokens."""
        return self.identity["pooled"]

    @property
    def length(self) -> int:
        """L, the tokens of a padded caption: the most of any, rounded up to a multiple of 8; 1 where they are pooled."""
        return 1 if self.pooled else rounded(self.header["longest"])

    @property
    def count(self) -> int:
        """How many records of the source have captions here: all."""
        return self.header["count"]

    @property
    def fingerprint(self) -> str:
        """Of the source."""
        return self.header["data"]["fingerprint"]

    @property
    def checksum(self) -> str:
        """Of all that is stored, 16 hexadecimal digits."""
        return shards.checksum(self.header)

    @functools.cached_property
    def null(self) -> tuple[np.ndarray, int]:
        """The caption "": (tokens float16 [n, E], n)."""
        (tokens,) = self.encoded(self.count)
        return tokens, len(tokens)

    def encoded(self, index: int) -> list[np.ndarray]:
        """The captions of a record: float16 [n, E] each.

        Raises:
          UserError: they are not finite, as a damaged file may hold them.
        """
        captions = _unpacked(self.records[index], self.width)
        if not all(np.isfinite(tokens).all() for tokens in captions):
            raise UserError(
                f"record {index} of {self.directory} is not finite; --verify names its shard: remove that and run {_COMMAND}"
                " again"
            )
        return captions

    def captions(self, index: int) -> list[str]:
        """The texts of a record's captions."""
        return json.loads(self._lines[index])

    @functools.cached_property
    def _lines(self) -> list[str]:
        path = self.directory / TEXTS
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({storage.first_line(e)}); run {_COMMAND} again") from e
        if len(lines) != self.count:
            raise UserError(f"{path} has {len(lines)} lines, not {self.count}; run {_COMMAND} again")
        return lines


@dataclasses.dataclass(frozen=True)
class EncodedCaptions:
    """What a record of a `CaptionedSource` holds as "texts": its captions, of which the loader takes one.

    Attributes:
      tokens: float16 [n, E] each.
      length: L, to which a caption is padded with zeros.
    """

    tokens: list[np.ndarray]
    length: int

    def padded(self, number: int) -> dict[str, np.ndarray]:
        """{"tokens": float16 [L, E], "length": int32} of a caption."""
        tokens = self.tokens[number]
        filled = np.zeros((self.length, tokens.shape[1]), tokens.dtype)
        filled[: len(tokens)] = tokens
        return {"tokens": filled, "length": np.int32(len(tokens))}


class CaptionedSource(JoinedSource):
    """A data source with the captions of a store: its records have "texts", an `EncodedCaptions`, too."""

    @property
    def texts(self) -> TextStore:
        return self._store

    def _beside(self, index: int) -> dict[str, Any]:
        return {"texts": EncodedCaptions(self.texts.encoded(index), self.texts.length)}


def with_texts(source: Any, directory: str) -> CaptionedSource:
    """The source with the captions of the store in `directory`, which must be those of its records.

    Latents have the captions of the images that they were made of.

    Raises:
      UserError: there is no whole store, or it is that of another data set.
    """
    store = open_texts(storage.path(directory))
    images = images_of(source)["fingerprint"]
    if (store.fingerprint, store.count) != (images, len(source)):
        raise UserError(
            f"data.text={directory} holds captions of another data set ({store.header['data']['source']}, {store.count:,} images,"
            f" fingerprint {store.fingerprint}) than data.source ({len(source):,} images, fingerprint {images}); run {_COMMAND}"
            " on this one"
        )
    return CaptionedSource(source, store)


def open_texts(directory: Path) -> TextStore:
    """Raises a UserError where `directory` does not hold all that its header says."""
    header = _read_header(directory)
    return TextStore(directory, header, shards.open_records(directory, header, header["count"] + 1, _COMMAND))


def _read_header(directory: Path) -> dict[str, Any]:
    header = shards.read_header(directory, _COMMAND)
    if "text" not in header:
        raise UserError(f"{directory} holds no captions but something else; name a directory that {_COMMAND} wrote")
    return header


def verify(directory: Path) -> dict[str, Any]:
    """Reads every file and compares checksums; returns the header.

    Raises:
      UserError: names the files that differ.
    """
    header = _read_header(directory)
    bad = shards.damaged(directory, header)
    if not (directory / TEXTS).exists() or storage.sha256(directory / TEXTS) != header["texts"]:
        bad.append(TEXTS)
    if bad:
        raise UserError(f"{directory}: {shards.listed(bad)} missing or damaged; remove them and run {_COMMAND} again")
    return header
