"""Do samples of more steps tell the strategies apart in the same way? Measures complete runs again, from their checkpoints.

  python -m benchmarks.speedup.sampling_steps --scale=cpu --strategies speed_cvpr25 uniform_v --seeds 0

The comparison draws with few steps of DPM-Solver++. Here the final ema draws with more steps of it, and with the 250 ancestral
steps (DDPM) of DiT's paper. Runs whose checkpoints are not in WORKDIR are left out; what OUT has already is not measured again.
Writes OUT/SCALE/sampling_steps_SET.json, and the page speedup_SCALE_sampling.md beside OUT.
"""

import argparse
import json
from pathlib import Path

from benchmarks.speedup.__main__ import ROOT
from benchmarks.speedup.data import FASHION, ImageSet, open_set
from benchmarks.speedup.judge import Judge
from benchmarks.speedup.piece import Evaluation
from benchmarks.speedup.plan import SCALES, STRATEGIES, Piece, make_config, pieces
from benchmarks.speedup.report import table
from speedit_jax.sharding import make_mesh
from speedit_jax.storage import write_json, write_text
from speedit_jax.training.assembly import assemble
from speedit_jax.training.checkpoint import Checkpoints

DIFFUSIONS = [name for name, changes in STRATEGIES.items() if "diffusion.path" not in changes]  # flows have other samplers
SAMPLERS = (("dpm++", 16), ("dpm++", 64), ("dpm++", 250), ("ddpm", 250))


def measure(piece: Piece, checkpoints: Checkpoints, images: ImageSet, judge: Judge) -> list[dict]:
    """[{"sampler", "steps", "fd", "kid", "accuracy"}] of the last ema of a run."""
    config, rows = make_config(piece), []
    for sampler, steps in SAMPLERS:
        config.sampling.update({"sampler": sampler, "spacing": "logsnr" if sampler == "dpm++" else "even", "num_steps": steps})
        parts = assemble(config, images.train, make_mesh(config.mesh))
        ema = checkpoints.restore_weights(SCALES[piece.scale].num_steps, "ema", parts.shapes.params, parts.shardings.params)
        found = Evaluation(parts, images, judge, SCALES[piece.scale])(ema)
        rows.append({"sampler": sampler, "steps": steps} | {name: found[name] for name in ("fd", "kid", "accuracy")})
        print(f"{piece.name}: {steps} steps of {sampler}: fd {found['fd']:.3g}, accuracy {found['accuracy']:.3f}", flush=True)
    return rows


def page(found: dict[str, list[dict]], scale: str) -> str:
    strategies = dict.fromkeys(name.partition("_")[2].rpartition("_seed")[0] for name in found)
    columns = [f"{steps} steps of {sampler}" for sampler, steps in SAMPLERS]
    rows = [[f"`{name}`", *(f"{row['fd']:.3g}, {row['accuracy']:.3f}" for row in rows)] for name, rows in found.items()]
    lines = [
        "# Do more sampling steps change the comparison?",
        "",
        "Fréchet distance and accuracy of the final ema of complete runs, from the same noise; the",
        "[protocol](speedup_protocol.md) says what the numbers mean. Its script wrote it, for runs whose checkpoints are there:",
        "",
        f"    python -m benchmarks.speedup.sampling_steps --scale={scale} --strategies {' '.join(strategies)}",
        "",
        *table(["", *columns], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--strategies", nargs="+", choices=DIFFUSIONS, required=True)
    parser.add_argument("--set", default="fashion", help="image set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "speedup", help="raw numbers")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "speedup", help="checkpoints")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="directory of Fashion-MNIST's files")
    parser.add_argument("--emoji", type=Path, help="the .tgz of emoji-datasource-google")
    args = parser.parse_args()
    out = args.out / args.scale / f"sampling_steps_{args.set}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    images = open_set(args.set, args.fashion, args.emoji)
    judge = Judge(images, args.out / f"judge_{args.set}.npz", SCALES[args.scale].num_images)
    for piece in pieces(args.scale):
        workdir = args.workdir / args.scale / piece.name
        chosen = piece.set == args.set and piece.strategy in args.strategies and piece.seed in args.seeds
        if not chosen or piece.name in found or not workdir.exists():
            continue
        checkpoints = Checkpoints(workdir)
        if checkpoints.latest() == SCALES[args.scale].num_steps:
            found[piece.name] = measure(piece, checkpoints, images, judge)
            write_json(out, found)
        checkpoints.close()
    write_text(args.out.parent / f"speedup_{args.scale}_sampling.md", page(found, args.scale))


if __name__ == "__main__":
    main()
