"""Encodes the captions of a data set once, so that no text encoder has to run during training.

  python -m speedit_jax.encode_text --data=folder:/path/to/images --encoder=minilm --out=data/texts
  python -m speedit_jax.train --config=configs/base.py --config.data.source=folder:/path/to/images \\
      --config.data.text=data/texts --workdir=runs/mine

Writes ArrayRecord shards of the tokens of every caption, captions.jsonl and header.json (speedit_jax/data/texts.py has the
format). Stop it at any time and run the same command again: finished shards stay, and the result is the same to the byte. With
--multihost every process writes its share of the missing shards; --out must be a directory that all see. --verify reads what is
there and compares checksums.
"""

import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from speedit_jax import cli, storage
from speedit_jax.config import get_config
from speedit_jax.data import shards, texts
from speedit_jax.data.captions import read_captions
from speedit_jax.data.folder import check_apart
from speedit_jax.data.sources import Source, name_of, open_source
from speedit_jax.encoders.text_encoder import TextEncoder
from speedit_jax.errors import UserError

_DATA = flags.DEFINE_string("data", None, "Images whose captions are encoded: folder:PATH or blobs, as config.data.source.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of the blobs, as config.data.split.")
_CLASSES = flags.DEFINE_string("classes", "", "Only these classes of a folder, as config.data.classes.")
_SIZE = flags.DEFINE_integer("synthetic_size", 4096, "Images of the blobs, as config.data.synthetic_size.", lower_bound=1)
_CAPTIONS = flags.DEFINE_string(
    "captions", "auto", "Where a folder's captions are: auto, metadata, a suffix such as .txt, or a table or COCO's JSON."
)
_MAX_MISSING = flags.DEFINE_integer("max_missing", 0, "How many images may be without a caption.", lower_bound=0)
_ENCODER = flags.DEFINE_string("encoder", None, "words, minilm, a directory of a BERT, or hf:NAME.")
_POOLED = flags.DEFINE_bool("pooled", False, "Store one vector a caption instead of its tokens.")
_OUT = flags.DEFINE_string("out", None, "Output directory.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Captions that are encoded together.", lower_bound=1)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 1024, "Images per file; an interruption loses at most one file's work.", lower_bound=1
)
_VERIFY = flags.DEFINE_bool("verify", False, "Check what is in --out, and write nothing.")


def open_images() -> Source:
    """The images, which are never read here."""
    if _DATA.value != "blobs" and not _DATA.value.startswith("folder:"):
        raise UserError(f"--data={_DATA.value}: only folder:PATH and blobs have captions")
    data = get_config().data
    data.update(source=_DATA.value, split=_SPLIT.value, classes=_CLASSES.value, synthetic_size=_SIZE.value)
    return open_source(ml_collections.ConfigDict(data))


def encode_text() -> None:
    if not _OUT.value:
        raise UserError("--out is missing; name a directory")
    out = storage.path(_OUT.value)
    if _VERIFY.value:
        header = texts.verify(out)
        print(f"{out}: {header['captions']:,} captions in {len(header['shards'])} shards; all checksums match")
        return
    for name, value in (("data", _DATA.value), ("encoder", _ENCODER.value)):
        if not value:
            raise UserError(f"--{name} is missing; --help has an example")
    source = open_images()
    check_apart(source, out, "out")
    captions = read_captions(source, _CAPTIONS.value, _MAX_MISSING.value)
    encoder = TextEncoder(_ENCODER.value, _POOLED.value)
    what = {
        "width": encoder.width,
        "text": encoder.identity,
        "data": {
            "source": _DATA.value,
            "count": len(source),
            "fingerprint": source.fingerprint,
            "captions": hashlib.sha256(texts.texts_of(captions).encode()).hexdigest(),
            "shard_size": _SHARD_SIZE.value,
        },
    }
    shards.claim(out, what, lambda saved: texts.check_same(out, saved, what))
    with_null = [*captions, [""]]
    paths = shards.shard_paths(out, len(with_null), _SHARD_SIZE.value)
    mine = shards.share(paths)
    parts = {i: with_null[i * _SHARD_SIZE.value : (i + 1) * _SHARD_SIZE.value] for i in mine}
    encoded, since = sum(len(record) for part in parts.values() for record in part), time.perf_counter()
    with tqdm(total=encoded, unit="caption", disable=jax.process_index() != 0 or not mine) as bar:
        for i, part in parts.items():
            first = i * _SHARD_SIZE.value
            texts.write_shard(paths[i], records(encoder, part, bar), lambda j, first=first: name_of(source, first + j))
    seconds = time.perf_counter() - since
    facts = shards.finished(paths)
    if jax.process_index() != 0:
        return
    shards.remove_partial(out)
    header = texts.write_header(out, what, captions, facts)
    rate = f", {encoded / seconds:.3g} captions/s on this host" if encoded else ""
    print(
        f"{header['captions']:,} captions of {header['count']:,} images in {len(paths)} shards in {out}{rate}: up to"
        f" {header['longest']} tokens of {encoder.width}"
    )
    say_cut(encoder, captions)
    print(f"Next: {shlex.join(training(out))}")


def training(out: Path) -> list[str]:
    """The command that trains on what was encoded: on the same images, with the same form of captions."""
    blobs = _DATA.value == "blobs"
    keys = {
        "data.source": _DATA.value,
        "data.synthetic_size": _SIZE.value if blobs else None,
        "data.split": _SPLIT.value if _SPLIT.value != "train" else None,
        "data.classes": _CLASSES.value,
        "data.text": out,
        "model.text": "pooled" if _POOLED.value else None,
    }
    settings = [f"--config.{key}={value}" for key, value in keys.items() if value]
    return ["python", "-m", "speedit_jax.train", "--config=configs/base.py", *settings, "--workdir=runs/mine"]


def records(encoder: TextEncoder, captions: list[list[str]], bar: tqdm) -> Iterator[list[np.ndarray]]:
    """The encoded captions of each record; batches of captions cross the borders of records, but not of shards."""
    flat = [text for record in captions for text in record]
    waiting, first = [], 0
    for record in captions:
        while len(waiting) < len(record):
            batch = flat[first : first + _BATCH_SIZE.value]
            tokens, lengths = encoder.encode(batch)
            waiting += [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            first += len(batch)
            bar.update(len(batch))
        yield waiting[: len(record)]
        waiting = waiting[len(record) :]


def say_cut(encoder: TextEncoder, captions: list[list[str]]) -> None:
    """One line where captions are longer than the encoder takes."""
    cut = [(text, lost) for record in captions for text in record if (lost := encoder.cut(text))]
    if cut:
        print(
            f"warning: {len(cut):,} captions are longer than the {encoder.identity['length']} tokens that {_ENCODER.value} takes;"
            f" the first one loses {cut[0][1][:80]!r}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(encode_text)
