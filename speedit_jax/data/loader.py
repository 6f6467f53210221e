"""Batches as a pure function of (seed, step).

The shuffled, endless order of records is global: record i of step s is number s * B + i of it, whatever the number of
hosts. Each host then loads only the rows that its devices hold. The position in the data is the step: nothing to save.

Memory: threads read READ_AHEAD batches of examples ahead, one batch is there twice while it is put together, and one is in use:
at most (READ_AHEAD + 3) x rows x bytes of an example on each host. ImageNet at 256 pixels has 768 KiB an example (float32), so
1.0 GB at 256 rows a host.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from speedit_jax.data.sources import Source

READ_AHEAD = 2  # batches: the next one is whole when it is asked for, and threads have work meanwhile


@dataclasses.dataclass(frozen=True)
class _Flip(grain.transforms.RandomMap):
    """Mirrors a share of the images left to right; of latents and features, takes those of the mirror image."""

    share: float

    def random_map(self, record, rng: np.random.Generator):
        mirrored = rng.random() < self.share
        if "features" in record:
            record |= {"features": record["features"].read(bool(mirrored))}
        if "moments" in record:
            return record | {"moments": record["moments"][int(mirrored)]}
        return record | {"image": record["image"][:, ::-1]} if mirrored else record


class _DrawCaption(grain.transforms.RandomMap):
    """Takes one of the captions of a record."""

    def random_map(self, record, rng: np.random.Generator):
        return _with_caption(record, int(rng.integers(len(record["texts"].tokens))))


def _plain(record):
    record = {name: value for name, value in record.items() if name != "features"}
    return _with_caption(record, 0) if "texts" in record else record


def _with_caption(record, number: int):
    others = {name: value for name, value in record.items() if name != "texts"}
    return others | {"text": record["texts"].padded(number)}


class _Rows(grain.transforms.Map):
    """Number j of this host's stream -> its record in the global order."""

    def __init__(self, records: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self._records, self._batch_size, self._rows = records, batch_size, rows

    def map(self, j: int):
        step, i = divmod(j, len(self._rows))
        return self._records[step * self._batch_size + int(self._rows[i])]


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    rows: np.ndarray,
    first_step: int,
    num_steps: int,
    flip: bool = False,
    threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps first_step..num_steps-1, loaded ahead in threads.

    Args:
      source: the records.
      seed: of the order, of the flips and of the choice of captions.
      batch_size: B, of the whole optimizer batch.
      rows: which of the B rows to load, increasing.
      flip: mirror half of the images; for sets in which left and right do not matter.
      threads: how many decode at once; 0 decodes when a batch is asked for.

    Yields:
      {"image": [len(rows), H, W, C] float32, "label": [len(rows)] int32}; of latents "moments" [len(rows), h, w, 2C] for "image".
      With captions also "text": {"tokens": [len(rows), L, E] float16, padded with zeros, "length": [len(rows)] int32}, of one
      caption of each record, drawn anew in each epoch. With features also "features": [len(rows), h, w, F] float16, of the mirror
      image where that is taken.
    """
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if flip or source.encoded_by or getattr(source, "features", None):
        records = records.random_map(_Flip(0.5 if flip else 0.0))
    if getattr(source, "texts", None):
        records = records.random_map(_DrawCaption())
    stream = grain.MapDataset.range(first_step * len(rows), num_steps * len(rows))
    return _batched(stream.map(_Rows(records, batch_size, rows)), len(rows), threads)


def in_order(source: Source, first: int, last: int, batch_size: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Records first..last-1 in batches, the last one smaller, loaded ahead in threads; 0 threads read when asked.

    With captions "text" is the first of each record's. Features, which only training wants, are left out.
    """
    return _batched(grain.MapDataset.source(source)[first:last].map(_plain), batch_size, threads)


def _batched(examples: grain.MapDataset, size: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `size`, whose examples are read ahead one by one. Its end, or its close(), ends the threads."""
    # Batched before this, the buffer would count batches, and a batch would be one thread's.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(READ_AHEAD * size, threads))
    with contextlib.closing(iter(examples.to_iter_dataset(options).batch(size))) as iterator:
        yield from iterator
