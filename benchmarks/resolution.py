"""What does a training step cost as images grow? DiG against DiT on this machine.

  python -m benchmarks.resolution --out=docs/results/resolution

For each resolution, the train step (SpeeDiT, AdamW, EMA, random latents of an eighth of the pixels) of
  DiG            gated linear attention, as model.gla=auto takes it
  DiT            softmax attention by its formula, which holds T x T logits a head
  DiT, chunked   the same, 256 queries at a time
  DiT, flash     cuDNN's or Pallas', as model.attention=auto takes it on an accelerator in bfloat16
all of one size and batch, with the same scan over layers and the same remat. The sides are compiled, stepped once to warm up, and
then timed in turn; --skip leaves out what would take too long. Bytes are XLA's own count of the compiled step. Writes
OUT.json after every resolution, adding to what it holds, and OUT.png. On two CPU cores it takes about an hour and, for DiT at
1792 pixels, 24 GiB. On a GPU:

  python -m benchmarks.resolution --sides DiG DiT "DiT, flash" --dtype=bfloat16 --remat=none --steps=20 --out=OUT
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.models.backbone import REMAT_POLICIES
from speedit_jax.models.build import SIZES
from speedit_jax.training.assembly import assemble

SIDES = {
    "DiG": {"name": "DiG"},
    "DiT": {"name": "DiT", "attention": "xla"},
    "DiT, chunked": {"name": "DiT", "attention": "chunked"},
    "DiT, flash": {"name": "DiT", "attention": "auto"},
}
PIXELS_PER_TOKEN = 16  # a side: 8 by the autoencoder, 2 by the patch
CLASSES = tuple(map(str, range(1000)))


class Side:
    """One alternative at one resolution, compiled."""

    def __init__(self, pixels: int, overrides: dict, args: argparse.Namespace):
        config = get_config()
        name = f"{overrides['name']}-{args.size}/2"
        config.model.update({**overrides, "name": name, "remat": args.remat, "dtype": args.dtype})
        config.training.batch_size = args.batch_size
        shape = (pixels // 8, pixels // 8, 4)
        parts = assemble(config, Description(shape, CLASSES), sharding.make_mesh(config.mesh, jax.devices()[:1]))
        self._key = jax.random.key(0)
        self._batch = {
            "image": np.random.default_rng(0).normal(size=(args.batch_size, *shape)).astype(np.float32),
            "label": np.zeros(args.batch_size, np.int32),
        }
        self._step = parts.lower_step().compile()
        self._state = parts.initial_state(self._key)
        memory = self._step.memory_analysis()
        self.mib = {
            "state": memory.argument_size_in_bytes / 2**20,
            "temporaries": memory.temp_size_in_bytes / 2**20,
        }

    def step(self) -> float:
        """Seconds of one training step."""
        since = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch, self._key)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - since


def measure(pixels: int, sides: list[str], args: argparse.Namespace) -> dict:
    """{"pixels", "tokens", side: {"seconds": [of each step], "mib": {...}}}, the sides in turn, without those that do not fit."""
    compiled = {}
    for name in tqdm(sides, f"{pixels} px: compiling and warming up"):
        try:
            side = Side(pixels, SIDES[name], args)
            side.step()
            compiled[name] = side
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            print(f"{pixels} px: {name} does not fit", flush=True)
    seconds = {name: [] for name in compiled}
    for _ in tqdm(range(args.steps), f"{pixels} px: timing"):
        for name, side in compiled.items():
            seconds[name].append(side.step())
    tokens = (pixels // PIXELS_PER_TOKEN) ** 2
    return {"pixels": pixels, "tokens": tokens} | {
        name: {"seconds": seconds[name], "mib": side.mib} for name, side in compiled.items()
    }


def exponent(rows: list[dict], name: str) -> float | None:
    """p of the least-squares fit seconds = a tokens^p; None of less than two points."""
    rows = [row for row in rows if name in row]
    if len(rows) < 2:
        return None
    seconds = [np.mean(row[name]["seconds"]) for row in rows]
    return float(np.polyfit(np.log([row["tokens"] for row in rows]), np.log(seconds), 1)[0])


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in SIDES:
        if not (shown := [row for row in rows if name in row]):
            continue
        tokens = [row["tokens"] for row in shown]
        axes[0].loglog(tokens, [np.mean(row[name]["seconds"]) for row in shown], marker="o", label=name)
        axes[1].loglog(tokens, [row[name]["mib"]["temporaries"] for row in shown], marker="o", label=name)
    for axis, title in zip(axes, ("seconds per training step", "MiB of temporary memory"), strict=True):
        axis.set_title(title)
        axis.set_xticks([row["tokens"] for row in rows], [row["pixels"] for row in rows], fontsize=8)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.set_xlabel("image side in pixels (logarithmic in tokens)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512, 768, 1024, 1280, 1536, 1792], help="sides of images")
    parser.add_argument("--sides", nargs="+", default=["DiG", "DiT", "DiT, chunked"], choices=list(SIDES))
    parser.add_argument("--size", default="S", choices=list(SIZES["DiT"]))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of activations")
    parser.add_argument("--remat", default="full", choices=list(REMAT_POLICIES))
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each")
    parser.add_argument("--skip", nargs="*", default=[], metavar="SIDE:PIXELS", help="for example 'DiT:1536'")
    args = parser.parse_args()

    path = args.out.with_suffix(".json")
    settings = {name: getattr(args, name) for name in ("size", "batch_size", "dtype", "remat")}
    known = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": []}
    if known["settings"] != settings:
        raise SystemExit(f"error: {path} was measured with {known['settings']}; choose another --out")
    rows = {row["pixels"]: row for row in known["rows"]}
    for pixels in args.pixels:
        row = measure(pixels, [name for name in args.sides if f"{name}:{pixels}" not in args.skip], args)
        rows[pixels] = rows.get(pixels, {}) | row
        times = {name: float(np.mean(side["seconds"])) for name, side in row.items() if name in SIDES}
        ratios = {name: f" ({s / times['DiG']:.2f}x DiG)" if "DiG" in times else "" for name, s in times.items()}
        print(f"{pixels} px:", ", ".join(f"{name} {s:.3g} s{ratios[name]}" for name, s in times.items()), flush=True)
        record = {
            "jax": jax.__version__,
            "settings": settings,
            "machine": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}",
            "rows": (ordered := [rows[p] for p in sorted(rows)]),
            "exponents": {name: exponent(ordered, name) for name in SIDES if any(name in row for row in ordered)},
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    draw(ordered, args.out.with_suffix(".png"))
    print("exponents:", record["exponents"])


if __name__ == "__main__":
    main()
