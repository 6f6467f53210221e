"""Does a network with text draw what it is told, also pairs of words that it never saw together?

  python -m benchmarks.text_blobs --out=docs/results/text_blobs.json [--model=DiT-tiny/4] [--steps=1000] [--seeds 0 1 2]

Trains configs/blobs.py on the 45 pairs of its training split, with each timestep strategy for as many steps, draws ten images of
each of the nine held-out pairs and looks for the nearest of the 54 undisturbed blobs. Chance is 1 in 54. Each strategy goes
through the commands: encode_text, train, sample.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from speedit_jax import __version__
from speedit_jax.data.blobs import caption, pairs, recognise
from speedit_jax.reporting.environment import HUGE_PAGES

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("speedit", "uniform")
DRAWINGS = 10  # of each pair
ENVIRONMENT = {"GLIBC_TUNABLES": HUGE_PAGES}  # as start-up advises; training took 98 s with it and 128 s without


def command(name: str, *flags: str) -> None:
    """Runs a command of the package; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"speedit_jax.{name}", *flags],
        cwd=ROOT,
        env=ENVIRONMENT | os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(flags)}\n{done.stdout}{done.stderr}")


def measure(directory: Path, strategy: str, model: str, steps: int, seed: int) -> dict[str, float]:
    """Trains, draws and looks.

    Returns:
      The shares of drawings of held-out pairs whose colour, place and both are right; and the seconds of training.
    """
    texts, workdir = directory / "texts", directory / f"{strategy}_{seed}"
    if not texts.exists():
        command("encode_text", "--data=blobs", "--encoder=words", f"--out={texts}")
    since = time.perf_counter()
    flags = {"data.text": texts, "timesteps.strategy": strategy, "training.num_steps": steps, "seed": seed}
    flags |= {"training.sample_every": 0, "optim.warmup_steps": min(100, steps // 10)}
    command(
        "train",
        f"--config=configs/blobs.py:{model}",
        *(f"--config.{key}={value}" for key, value in flags.items()),
        f"--workdir={workdir}",
    )
    seconds = time.perf_counter() - since
    wanted = pairs("held_out")
    (directory / "prompts.txt").write_text("".join(f"{caption(*pair)}\n" for pair in wanted))
    command(
        "sample",
        f"--workdir={workdir}",
        f"--prompts_file={directory / 'prompts.txt'}",
        f"--num_images={DRAWINGS * len(wanted)}",
        "--batch_size=90",
        f"--out={workdir / 'held_out'}",
    )
    with np.load(workdir / "held_out.npz") as drawn:
        images, prompts = drawn["arr_0"], drawn["arr_1"]
    colour, place = recognise(images / 127.5 - 1)
    right = np.stack([colour, place], axis=1) == np.array(wanted)[prompts]
    shares = {"colour": right[:, 0], "place": right[:, 1], "both": right.all(axis=1)}
    return {name: float(values.mean()) for name, values in shares.items()} | {"seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="DiT-tiny/4")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    found = []
    record = {"model": args.model, "steps": args.steps, "drawings_a_pair": DRAWINGS, "held_out_pairs": len(pairs("held_out"))}
    record |= {"cpus": os.cpu_count(), "versions": {"speedit_jax": __version__, "jax": jax.__version__}, "runs": found}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for strategy in STRATEGIES:
                values = measure(Path(scratch), strategy, args.model, args.steps, seed)
                found.append({"strategy": strategy, "seed": seed, **values})
                print(json.dumps(found[-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
