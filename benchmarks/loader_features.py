"""What do stored features cost the loader? Batches of latents with the features of a DINOv2-B beside them, and without.

  python -m benchmarks.loader_features --out=docs/results/loader_features.json

Writes latents of 256 pixels (32 x 32 x 4) and features of 16 x 16 x 768 of as many images, random numbers, of images and of
mirror images, and reads shuffled batches of both with 4 threads, in turn. The files are in the system's memory after the first
round, so this measures the work of reading and of putting together, not a disk.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speedit_jax.config import get_config
from speedit_jax.data import features, latents, loader, shards
from speedit_jax.data.sources import Source, open_source

BATCH, THREADS, SHARD = 64, 4, 256
LATENT, FEATURES = (32, 32, 4), (16, 16, 768)


def write_sets(root: Path, count: int) -> None:
    """ROOT/latents and ROOT/features."""
    rng = np.random.default_rng(0)
    moments, of_image = (rng.standard_normal((2, *shape), np.float32) for shape in ((32, 32, 8), FEATURES))
    (root / "latents").mkdir()
    (root / "features").mkdir()
    paths = {name: shards.shard_paths(root / name, count, SHARD) for name in ("latents", "features")}
    sizes = [min(SHARD, count - first) for first in range(0, count, SHARD)]
    facts = [
        latents.write_shard(path, ((0, moments) for _ in range(size))) for path, size in zip(paths["latents"], sizes, strict=True)
    ]
    images = {"fingerprint": "of the benchmark", "shape": [256, 256, 3]}
    what = {"shape": list(LATENT), "class_names": [], "latents": {"vae": "none", "weights": "none"}, "images": images}
    latents.write_header(root / "latents", what, facts)
    facts = [
        features.write_shard(path, (of_image for _ in range(size)), "image {}".format)
        for path, size in zip(paths["features"], sizes, strict=True)
    ]
    data = {"source": "random", "count": count, "fingerprint": images["fingerprint"], "image_shape": images["shape"]}
    what = {"shape": list(FEATURES), "mirrored": True, "features": {"encoder": "random"}, "data": data}
    features.write_header(root / "features", what, facts)


def rates(source: Source) -> tuple[float, float]:
    """(images/s, CPU seconds an image) of all images, shuffled and mirrored at random."""
    keys = {"seed": 0, "batch_size": BATCH, "rows": np.arange(BATCH), "first_step": 0, "flip": True, "threads": THREADS}
    since = time.perf_counter(), time.process_time()
    count = sum(len(batch["label"]) for batch in loader.batches(source, num_steps=len(source) // BATCH, **keys))
    return count / (time.perf_counter() - since[0]), (time.process_time() - since[1]) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    before = os.getloadavg()[0]  # processes at work, in the last minute
    with tempfile.TemporaryDirectory() as scratch:
        write_sets(Path(scratch), args.images)
        data = get_config().data
        data.update(source=f"latents:{scratch}/latents", flip=True)
        sources = {"without": open_source(data)}
        data.features = f"{scratch}/features"
        sources["with"] = open_source(data)
        measured = {name: [] for name in sources}
        for _ in tqdm(range(args.rounds)):
            for name, source in sources.items():
                measured[name].append(rates(source))
    best = {name: max(rate for rate, _ in of) for name, of in measured.items()}
    cpu = {name: min(seconds for _, seconds in of) for name, of in measured.items()}
    record = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load": {"before": before, "after": os.getloadavg()[0]},
        "batch_size": BATCH,
        "threads": THREADS,
        "images": args.images,
        "bytes_an_image": {"latents": 4 + 2 * 2 * 8 * 32 * 32, "features": 2 * int(np.prod(FEATURES))},
        "images_per_second": {name: [rate for rate, _ in of] for name, of in measured.items()},
        "cpu_seconds_an_image": {name: [seconds for _, seconds in of] for name, of in measured.items()},
        "ratio": best["with"] / best["without"],
        "ratio_of_cpu_seconds": cpu["with"] / cpu["without"],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in sources:
        print(f"{name} features: {best[name]:,.0f} images/s, {1000 * cpu[name]:.3f} CPU ms an image")
    print(f"with over without: {record['ratio']:.2f} of the images/s, {record['ratio_of_cpu_seconds']:.1f} times the CPU seconds")


if __name__ == "__main__":
    main()
