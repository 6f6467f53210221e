"""What does encoding at every step cost? Training on stored latents against encoding images as they come, on this machine.

  python -m benchmarks.encode_throughput --out=docs/results/encode.json

Draws a folder of JPEGs of many sizes from scikit-learn's two photographs, encodes it with speedit_jax.encode, and measures
  loading   images/s of the folder at 256 pixels, by threads, and of the stored latents; nothing else runs
  training  images/s of loader and train step (DiT-S/2 and SpeeDiT as configs/imagenet.py has them): on the stored latents, and on
            the folder with the same autoencoder before each step, in turn
The autoencoder is --vae, or Stable Diffusion's architecture with random weights, which cost the same. It takes about half an hour
and 6 GiB on two CPU cores.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from configs import imagenet
from speedit_jax import sharding
from speedit_jax.data import loader
from speedit_jax.data.sources import Source, open_source
from speedit_jax.testing.vae_weights import write_vae
from speedit_jax.training.assembly import assemble
from speedit_jax.training.batches import batches

PIXELS = 256
THREADS = (0, 1, 2, 3, 4)


def draw_folder(root: Path, count: int) -> None:
    """`count` JPEGs in two classes: crops of 256 to 400 pixels a side of the photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images()
    for i in range(count):
        which = i % 2
        photograph = photographs.images[which]
        size = rng.integers(PIXELS, 401, 2)
        top, left = (rng.integers(0, full - part + 1) for full, part in zip(photograph.shape[:2], size, strict=True))
        directory = root / Path(photographs.filenames[which]).stem
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + size[0], left : left + size[1]]).save(directory / f"{i:04d}.jpg", quality=90)


def encode(folder: Path, vae: str, out: Path, batch_size: int) -> None:
    """speedit_jax.encode as a user calls it."""
    command = [sys.executable, "-m", "speedit_jax.encode", f"--source=folder:{folder}", f"--size={PIXELS}", f"--vae={vae}"]
    subprocess.run([*command, f"--out={out}", f"--batch_size={batch_size}"], check=True)


def data_config(source: str, batch_size: int):
    config = imagenet.get_config("DiT-S/2")
    config.data.source = source
    config.training.batch_size = batch_size
    return config


def stream(source: Source, batch_size: int, num_steps: int, threads: int):
    rows = np.arange(batch_size)
    keys = {"seed": 0, "rows": rows, "first_step": 0, "flip": True}
    return loader.batches(source, batch_size=batch_size, num_steps=num_steps, threads=threads, **keys)


class Clock:
    """Images/s, and the seconds of all cores that an image costs: the latter hardly depends on what else the machine does."""

    def __init__(self):
        self._since = time.perf_counter(), time.process_time()

    def read(self, images: int) -> dict[str, float]:
        wall, cpu = (now - since for now, since in zip((time.perf_counter(), time.process_time()), self._since, strict=True))
        return {"images_per_second": images / wall, "cpu_seconds": cpu / images}


def loading(source: Source, batch_size: int, num_steps: int, threads: int) -> dict[str, float]:
    """The loader alone."""
    clock = Clock()
    return clock.read(sum(len(batch["label"]) for batch in stream(source, batch_size, num_steps, threads)))


class Training:
    """Loader, autoencoder where images come, and the train step, compiled and warm: what train.py's loop runs."""

    def __init__(self, config, mesh):
        self._source = open_source(config.data)
        self._parts = assemble(config, self._source, mesh)
        self._key = jax.random.key(0)
        self._state, self._step = self._parts.initial_state(self._key), self._parts.jit_step()
        self.run(1)

    def run(self, num_steps: int) -> dict[str, float]:
        clock = Clock()
        for batch in batches(self._parts, self._source, 0, num_steps):
            with jax.set_mesh(self._parts.mesh):
                self._state, metrics = self._step(self._state, batch, self._key)
        jax.block_until_ready((self._state, metrics))
        return clock.read(num_steps * self._parts.config.training.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--vae", help="a diffusers AutoencoderKL instead of random weights")
    parser.add_argument("--images", type=int, default=320, help="of the folder whose loading is timed")
    parser.add_argument("--encoded", type=int, default=48, help="of the folder that is encoded and trained on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        vae = args.vae or str(write_vae(scratch / "vae", "full"))
        for name, count in (("many", args.images), ("few", args.encoded)):
            draw_folder(scratch / name, count)
        record = {
            "jax": jax.__version__,
            "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}",
            "arguments": {name: str(value) for name, value in vars(args).items()},
        }
        encode(scratch / "few", vae, scratch / "latents", args.batch_size)
        online = data_config(f"folder:{scratch / 'few'}", args.batch_size)
        stored = data_config(f"latents:{scratch / 'latents'}", args.batch_size)
        many = open_source(data_config(f"folder:{scratch / 'many'}", args.batch_size).data)
        latents = open_source(stored.data)
        record["loading"] = {f"{threads} threads": [] for threads in THREADS} | {"latents, 4 threads": []}
        for _ in tqdm(range(args.rounds), "loading"):
            for threads in THREADS:
                record["loading"][f"{threads} threads"].append(loading(many, 8, args.images // 8, threads))
            record["loading"]["latents, 4 threads"].append(loading(latents, 8, args.images, 4))

        mesh = sharding.make_mesh(online.mesh, jax.devices()[:1])
        online.data.vae = vae
        sides = {"stored": Training(stored, mesh), "online": Training(online, mesh)}
        record["training"] = {name: [] for name in sides}
        for _ in tqdm(range(args.rounds), "training"):
            for name, side in sides.items():
                record["training"][name].append(side.run(args.steps))
    medians = {
        name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        for name, runs in (record["loading"] | record["training"]).items()
    }
    stored, online = medians["stored"], medians["online"]
    record |= {
        "medians": medians,
        "factor": stored["images_per_second"] / online["images_per_second"],
        "factor_of_cpu_seconds": online["cpu_seconds"] / stored["cpu_seconds"],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, median in medians.items():
        print(f"{name}: {median['images_per_second']:.2f} images/s, {median['cpu_seconds']:.4f} CPU seconds an image")
    print(f"stored over online: {record['factor']:.1f}, by CPU seconds {record['factor_of_cpu_seconds']:.1f}")


if __name__ == "__main__":
    main()
