"""What complete runs draw: two images of each class from the same noise, a row for each run.

  python -m benchmarks.speedup.pictures cpu/uniform cpu/flow_x0 methods/irepa --out=docs/results/speedup_fashion_pictures.png

Each is SCALE/STRATEGY. Draws as the comparison does, with the final ema from the checkpoint in WORKDIR.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.speedup.data import add_places, open_set
from benchmarks.speedup.piece import fixed_samples
from benchmarks.speedup.plan import SCALES, Piece, pieces
from benchmarks.speedup.resample import complete, restored
from speedit_jax.errors import UserError
from speedit_jax.sampling.images import image_grid


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
    add_places(parser)
    args = parser.parse_args()
    wanted = [Piece(scale, args.set, strategy, args.seed) for scale, _, strategy in (run.partition("/") for run in args.runs)]
    for piece, run in zip(wanted, args.runs, strict=True):
        if piece.scale not in SCALES or piece not in pieces(piece.scale):
            parser.error(f"{run} with --set={args.set} --seed={args.seed} is no run of the comparison")
    images, rows = open_set(args.set, args.fashion, args.emoji), {}
    for piece, run in zip(wanted, args.runs, strict=True):
        checkpoints = complete(args.workdir, piece)
        if not checkpoints:
            parser.error(f"{run} is not complete in {args.workdir}")
        parts, ema = restored(piece, checkpoints, images, {})
        classes = len(images.train.class_names)
        (rows[run],) = fixed_samples(parts, classes, 2 * classes).draw(ema, 2 * classes)
    figure(rows).savefig(args.out, dpi=72)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"error: {e}") from e
