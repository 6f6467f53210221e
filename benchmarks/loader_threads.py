"""How many images a second do 0, 1, 4 and 8 threads decode, for training and in order, on this machine?

  python -m benchmarks.loader_threads --out=docs/results/loader_threads.json

Draws a folder of JPEGs of 512 pixels from scikit-learn's two photographs and loads it at 256 pixels. The fastest round counts:
other work on the machine only slows one down, and the JSON has its load. It also writes how many images were decoded when the
first batch was there and nobody asked for another: a batch and what is read ahead.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np
from PIL import Image
from tqdm import tqdm

from speedit_jax.config import get_config
from speedit_jax.data import loader
from speedit_jax.data.sources import Source, open_source

PIXELS = 256
THREADS = (0, 1, 4, 8)
BATCH = 64


def draw_folder(root: Path, count: int) -> None:
    """`count` JPEGs of 512 x 512: crops of the 427 x 640 photographs that scikit-learn ships, enlarged."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(count):
        left = int(rng.integers(0, 640 - 427))
        crop = Image.fromarray(photographs[i % 2][:, left : left + 427])
        crop.resize((512, 512), Image.Resampling.BICUBIC).save(root / f"{i:04d}.jpg", quality=90)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A source that counts its reads."""

    source: Source
    reads: itertools.count = dataclasses.field(default_factory=lambda: itertools.count(1))
    latents = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        next(self.reads)
        return self.source[index]


def load(source: Source, order: str, threads: int) -> Iterator[dict[str, np.ndarray]]:
    if order == "in order":
        return loader.in_order(source, 0, len(source), BATCH, threads)
    steps = len(source) // BATCH
    rows = np.arange(BATCH)
    return loader.batches(source, seed=0, batch_size=BATCH, rows=rows, first_step=0, num_steps=steps, threads=threads)


def images_per_second(source: Source, order: str, threads: int) -> float:
    since = time.perf_counter()
    count = sum(len(batch["label"]) for batch in load(source, order, threads))
    return count / (time.perf_counter() - since)


def decoded_after_one_batch(source: Source, order: str, threads: int) -> int:
    counted = Counted(source)
    loaded = load(counted, order, threads)
    next(loaded)
    time.sleep(5)  # as a long step would
    loaded.close()
    return next(counted.reads) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    before = os.getloadavg()[0]  # processes at work, in the last minute
    cases = list(itertools.product(("shuffled", "in order"), THREADS))
    with tempfile.TemporaryDirectory() as scratch:
        draw_folder(Path(scratch), args.images)
        sizes = {"source": f"folder:{scratch}", "height": PIXELS, "width": PIXELS}
        source = open_source(ml_collections.ConfigDict(get_config().data.to_dict() | sizes))
        rates = {case: [] for case in cases}
        for _, case in tqdm(list(itertools.product(range(args.rounds), cases))):
            rates[case].append(images_per_second(source, *case))
        decoded = {case: decoded_after_one_batch(source, *case) for case in cases}
    rows = [
        {"order": order, "threads": threads, "images_per_second": rates[order, threads], "decoded": decoded[order, threads]}
        for order, threads in cases
    ]
    record = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load": {"before": before, "after": os.getloadavg()[0]},
        "batch_size": BATCH,
        "pixels": PIXELS,
        "images": args.images,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        rate = max(row["images_per_second"])
        print(f"{row['order']}, {row['threads']} threads: {rate:.0f} images/s, {row['decoded']} decoded after a batch of {BATCH}")


if __name__ == "__main__":
    main()
