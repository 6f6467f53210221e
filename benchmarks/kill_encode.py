"""Is an encoding that is killed and started again, by as many hosts or by others, the same to the byte as one left alone?

  apt-get install dataset-fashion-mnist
  python -m benchmarks.kill_encode --out=docs/results/kill_encode.json

Writes images of Fashion-MNIST as PNGs, a directory a class, and encodes them without interruption. Then, for each experiment,
encodes them into a fresh directory, kills all processes (SIGKILL) at a random moment after the first shard, does so
again, lets the third attempt finish, and compares every file with the uninterrupted encoding's and, by --verify, the checksums.
Several hosts are processes of this machine that --multihost joins. The autoencoder is --vae, or a small one with random weights.
Exits with 1 if anything differs.
"""

import argparse
import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from speedit_jax import __version__
from speedit_jax.testing.vae_weights import write_vae

ROOT = Path(__file__).resolve().parents[1]
# How many hosts each of three attempts has.
EXPERIMENTS = ((1, 1, 1), (2, 2, 2), (2, 1, 2), (1, 2, 1))
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def write_folder(package: Path, root: Path, count: int) -> None:
    """The first `count` images of Fashion-MNIST's training set."""
    images, labels = (
        np.frombuffer(gzip.decompress((package / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = images.reshape(-1, 28, 28)
    for i in range(count):
        directory = root / CLASSES[labels[i]]
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(directory / f"{i:05d}.png")


def start(command: list[str], hosts: int, log: Path) -> list[subprocess.Popen]:
    """One process a host."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    processes = []
    for host in range(hosts):
        joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(host)}
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | (joined if hosts > 1 else {})
        with log.open("a") as file:
            argv = [*command, "--multihost"] if hosts > 1 else command
            processes.append(subprocess.Popen(argv, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT))
    return processes


def finished(out: Path) -> int:
    """How many shards are there."""
    return len(list(out.glob("*-of-*.json")))


def wait_for_a_shard(processes: list[subprocess.Popen], out: Path) -> None:
    """Until one more is there, or a process has ended."""
    before = finished(out)
    while finished(out) == before and all(process.poll() is None for process in processes):
        time.sleep(0.001)


def kill(processes: list[subprocess.Popen], out: Path, delay: float) -> dict:
    """SIGKILL for all, `delay` seconds after they finished a shard. Returns what was there then."""
    wait_for_a_shard(processes, out)
    time.sleep(delay)
    for process in processes:
        process.kill()
    codes = [process.wait() for process in processes]
    return {"hosts": len(processes), "exit codes": codes, "shards finished": finished(out)}


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def finish(command: list[str], hosts: int, log: Path) -> None:
    codes = [process.wait() for process in start(command, hosts, log)]
    if any(codes):
        sys.exit(f"error: exit codes {codes}: {log.read_text()[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--package", type=Path, default="/usr/share/datasets/fashion-mnist", help="where Debian puts the set")
    parser.add_argument("--vae", help="a diffusers AutoencoderKL instead of random weights")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--shard_size", type=int, default=25)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_folder(args.package, scratch / "images", args.images)
        command = [sys.executable, "-m", "speedit_jax.encode", f"--source=folder:{scratch / 'images'}", "--batch_size=4"]
        command += [f"--vae={args.vae or write_vae(scratch / 'vae', 'small')}", f"--shard_size={args.shard_size}"]
        command += [f"--size={args.size}"]
        whole, log = scratch / "whole", scratch / "log"
        (process,) = start([*command, f"--out={whole}"], 1, log)
        wait_for_a_shard([process], whole)
        since = time.perf_counter()
        if process.wait():
            sys.exit(f"error: {log.read_text()[-500:]}")
        seconds, expected = time.perf_counter() - since, contents(whole)
        for hosts in EXPERIMENTS:
            out = scratch / "-".join(map(str, hosts))
            encode = [*command, f"--out={out}"]
            kills = [kill(start(encode, n, log), out, rng.uniform(0, seconds / 4)) for n in hosts[:-1]]
            finish(encode, hosts[-1], log)
            finish([*command[:3], f"--out={out}", "--verify"], 1, log)
            differing = sorted(name for name, value in (contents(out).items() ^ expected.items()))
            rows.append({"hosts": hosts, "kills": kills, "differing": differing})
            shards = ", ".join(f"{k['shards finished']} shards of {len(list(out.glob('*.array_record')))}" for k in kills)
            print(f"hosts {hosts}: killed at {shards}: {'DIFFERENT' if differing else 'identical'}", flush=True)
    struck = all(-9 in k["exit codes"] for row in rows for k in row["kills"])
    print(f"{len(expected)} files compared" + ("" if struck else "; a kill came too late: take more --images"))
    if args.out:
        record = {
            "images": args.images,
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
            "files": len(expected),
            "experiments": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if struck and not any(row["differing"] for row in rows) else 1)


if __name__ == "__main__":
    main()
