"""The PyTorch original, github.com/facebookresearch/DiT, beside ours in one process: what the benchmarks against it share.

They need torch, and a checkout, whose code runs as it is:  git clone https://github.com/facebookresearch/DiT
timm is taken where it is installed; else stand-ins for the three modules that DiT takes from it serve.
"""

import argparse
import ast
import collections
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from tqdm import tqdm

from speedit_jax.interop import dit as names
from speedit_jax.models.build import SIZES
from speedit_jax.testing.published import load, make_network, provide_timm

LATENTS = (32, 32, 4)  # of 256 pixels
CLASSES = 1000
PATCH = 2


class Original:
    """The published code and a DiT-S/2 of it, in eval mode, all of whose weights are random.

    Attributes:
      network: the module.
      diffusion: the package.
      update_ema: of train.py, which itself does not import without a GPU's world around it.
    """

    def __init__(self, checkout: Path):
        provide_timm()
        self.diffusion = load("dit_diffusion", checkout / "diffusion")
        width, depth, heads = SIZES["DiT"]["S"]
        sizes = {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": PATCH, "num_classes": CLASSES}
        sizes |= {"input_size": LATENTS[0], "in_channels": LATENTS[2]}
        self.network = make_network(load("dit_models", checkout / "models.py"), **sizes)
        self.update_ema = function_of(checkout / "train.py", "update_ema")

    def parameters(self, like: Any) -> Any:
        """The network's weights arranged as our parameters."""
        state = {name: value.detach().numpy() for name, value in self.network.state_dict().items()}
        return names.TABLE.from_torch(state, like, PATCH)


def function_of(path: Path, name: str) -> Callable:
    """One function of a file the rest of which is not run."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    namespace = {"torch": torch, "OrderedDict": collections.OrderedDict}
    exec(compile(tree, path, "exec"), namespace)
    return namespace[name]


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, these among them that both benchmarks take; keeps all of this process to --threads cores."""
    parser.add_argument("--dit", type=Path, required=True, help="checkout of facebookresearch/DiT")
    parser.add_argument("--threads", type=int, default=2, help="and cores, of either side")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 0 < args.threads <= len(cores):
        parser.error(f"--threads={args.threads}: there are {len(cores)} cores")
    if not (args.dit / "models.py").exists():
        parser.error(f"--dit={args.dit}: no models.py there; git clone https://github.com/facebookresearch/DiT")
    # XLA makes its threads at the first use of a device: as many as there are cores then.
    os.sched_setaffinity(0, cores[: args.threads])
    torch.set_num_threads(args.threads)
    return args


def in_turn(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Runs every side once a round: name -> the rounds' {"seconds": by the clock, "cpu_seconds": of all threads}."""
    runs = {name: [] for name in sides}
    for _ in tqdm(range(rounds), "rounds"):
        for name, side in sides.items():
            since = time.perf_counter(), time.process_time()
            side()
            now = time.perf_counter(), time.process_time()
            runs[name].append({"seconds": now[0] - since[0], "cpu_seconds": now[1] - since[1]})
    return runs


def report(runs: dict[str, list[dict[str, float]]], images: int, checks: dict[str, float], args: argparse.Namespace) -> None:
    """Prints a table in Markdown, and writes --out.

    Args:
      runs: of `in_turn`, whose names are (side, precision) with a comma between.
      images: that a side makes or learns from in a round.
      checks: how far both sides' results lie apart.
    """
    seconds = {name: np.array([run["seconds"] for run in of]) for name, of in runs.items()}
    cpu = {name: np.median([run["cpu_seconds"] for run in of]) for name, of in runs.items()}
    rows = {}
    for name in runs:
        rows[name] = {
            "images_per_second": images / float(np.median(seconds[name])),
            "range": [images / float(seconds[name].max()), images / float(seconds[name].min())],
            "cpu_seconds_per_image": float(cpu[name]) / images,
        }
        ours = f"ours, {name.partition(', ')[2]}"
        if ours in runs and name != ours:
            # Sides of one round met the same machine: the ratio of each round, and of the medians.
            of_rounds = seconds[name] / seconds[ours]
            rows[name]["ours_over_it"] = float(np.median(seconds[name]) / np.median(seconds[ours]))
            rows[name]["ours_over_it_range"] = [float(of_rounds.min()), float(of_rounds.max())]
            rows[name]["ours_over_it_by_cpu_seconds"] = float(cpu[name] / cpu[ours])
    record = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "timm": getattr(sys.modules.get("timm"), "__version__", "stand-ins"),
        "python": platform.python_version(),
        "machine": f"{_processor()}, {args.threads} threads",
        "load": os.getloadavg()[0],
        "arguments": {name: str(value) for name, value in vars(args).items() if not isinstance(value, Path)},
        **checks,
        "medians": rows,
        "rounds": runs,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    versions = ", ".join(f"{name} {record[name]}" for name in ("jax", "torch", "timm", "python"))
    print(f"\n{versions}; {record['machine']}; load {record['load']:.1f}; {checks}\n")
    print("| | images/s | range | CPU seconds an image | ours over it | range | by CPU seconds |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [
            f"{row['images_per_second']:.3g}",
            "{:.3g} to {:.3g}".format(*row["range"]),
            f"{row['cpu_seconds_per_image']:.3f}",
        ]
        if "ours_over_it" in row:
            low_high = "{:.2f} to {:.2f}".format(*row["ours_over_it_range"])
            cells += [f"**{row['ours_over_it']:.2f}**", low_high, f"{row['ours_over_it_by_cpu_seconds']:.2f}"]
        else:
            cells += [""] * 3
        print(f"| {' | '.join([name, *cells])} |")


def _processor() -> str:
    found = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0] if found else platform.machine()
