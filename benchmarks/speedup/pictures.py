"""What complete runs draw: two images of each class from the same noise, a row for each run.

  python -m benchmarks.speedup.pictures cpu/uniform cpu/flow_x0 methods/irepa --out=docs/results/speedup_fashion_pictures.png

Each is SCALE/STRATEGY. Draws as the comparison does, with the final ema from the checkpoint in WORKDIR.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.speedup.__main__ import ROOT
from benchmarks.speedup.data import FASHION, open_set
from benchmarks.speedup.judge import Judge
from benchmarks.speedup.plan import SCALES, Piece, make_config
from benchmarks.speedup.resample import drawn
from speedit_jax.sampling.images import image_grid
from speedit_jax.training.checkpoint import Checkpoints


def figure(rows: dict[str, np.ndarray]) -> Figure:
    """name -> uint8 [2 classes, H, W, C], one below the other."""
    grids = {name: image_grid(images, len(images) // 2) for name, images in rows.items()}
    height, width = next(iter(grids.values())).shape[:2]
    made = Figure(figsize=(10, (10 * height / width + 0.3) * len(grids)), layout="constrained")
    for axes, (name, grid) in zip(made.subplots(len(grids), squeeze=False)[:, 0], grids.items(), strict=True):
        axes.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_axis_off()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="SCALE/STRATEGY")
    parser.add_argument("--set", default="fashion", help="image set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="PNG")
    parser.add_argument("--raw", type=Path, default=ROOT / "docs" / "results" / "speedup", help="raw numbers, with the judge")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "speedup", help="checkpoints")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="directory of Fashion-MNIST's files")
    parser.add_argument("--emoji", type=Path, help="the .tgz of emoji-datasource-google")
    args = parser.parse_args()
    images = open_set(args.set, args.fashion, args.emoji)
    judge = Judge(images, args.raw / f"judge_{args.set}.npz", 100)
    rows = {}
    for run in args.runs:
        scale, _, strategy = run.partition("/")
        piece = Piece(scale, args.set, strategy, args.seed) if scale in SCALES else None
        workdir = piece and args.workdir / scale / piece.name
        if not workdir or not workdir.exists():
            parser.error(f"{run}: there is no checkpoint of it in {args.workdir}")
        checkpoints = Checkpoints(workdir)
        if checkpoints.latest() != make_config(piece).training.num_steps:
            parser.error(f"{run} is not complete")
        evaluation, ema = drawn(piece, {}, checkpoints, images, judge)
        rows[strategy] = evaluation.pictures(ema)
        checkpoints.close()
    figure(rows).savefig(args.out, dpi=72)


if __name__ == "__main__":
    main()
