"""Which timesteps make training faster? Trains what is missing of the comparison, within a budget of time.

  python -m benchmarks.speedup --scale=cpu --budget_s=3600
  python -m benchmarks.speedup.report --scale=cpu

docs/results/speedup_protocol.md says what is compared, and how. Each run is a piece; its raw numbers are written to
OUT/SCALE/PIECE.json after every evaluation. What is complete there is never trained again; what is not goes on from its last
checkpoint, in WORKDIR/SCALE/PIECE, or from its start where there is none. The command ends when all is complete, or when the
budget is spent, or at Ctrl-C or SIGTERM, with everything saved; run it again to go on.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.speedup.data import FASHION, RAW, add_places, open_set
from benchmarks.speedup.judge import Judge
from benchmarks.speedup.piece import Run
from benchmarks.speedup.plan import ALL, SCALES, Piece, pieces
from speedit_jax.errors import UserError
from speedit_jax.training.stop import Stop


def is_complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text())["complete"]


def fill(
    wanted: list[Piece], out: Path, workdir: Path, budget_s: float, fashion: Path = FASHION, emoji: Path | None = None
) -> int:
    """Trains the pieces in turn; returns how many are not complete."""
    deadline, asked, open_ = time.monotonic() + budget_s, Stop(), {}

    def stop(step: int) -> bool:
        return asked(step) or time.monotonic() > deadline

    missing = [piece for piece in wanted if not is_complete(out / piece.scale / f"{piece.name}.json")]
    for i, piece in enumerate(missing):
        if stop(0):
            return len(missing) - i
        if piece.set not in open_:
            images = open_set(piece.set, fashion, emoji)
            open_ = {piece.set: (images, Judge(images, out / f"judge_{piece.set}.npz", SCALES[piece.scale].num_images))}
        run = Run(piece, *open_[piece.set], workdir / piece.scale / piece.name)
        print(f"{piece.name}: from step {run.step} of {run.num_steps}; {len(missing) - i} pieces to go", flush=True)
        run.advance(stop, out / piece.scale / f"{piece.name}.json")
        if not run.complete:
            return len(missing) - i
        last = run.progress["rows"][-1]["weights"]["ema"]
        print(f"{piece.name}: " + ", ".join(f"{name} {last[name]:.4g}" for name in ("fd", "kid", "accuracy")), flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--budget_s", type=float, required=True, help="seconds after which it saves and ends")
    parser.add_argument("--strategies", nargs="+", choices=ALL, help="only these")
    parser.add_argument("--sets", nargs="+", help="only these image sets")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--out", type=Path, default=RAW, help="raw numbers")
    add_places(parser)
    args = parser.parse_args()
    wanted = [
        piece
        for piece in pieces(args.scale)
        if (not args.strategies or piece.strategy in args.strategies)
        and (not args.sets or piece.set in args.sets)
        and (args.seeds is None or piece.seed in args.seeds)
    ]
    try:
        left = fill(wanted, args.out, args.workdir, args.budget_s, args.fashion, args.emoji)
    except UserError as e:
        raise SystemExit(f"error: {e}") from e
    print(f"{left} of {len(wanted)} pieces are not complete; run the same command again" if left else "all pieces are complete")


if __name__ == "__main__":
    main()
