"""Other ways of sampling, and other judges: measures the final ema of complete runs again, from their checkpoints.

  python -m benchmarks.speedup.resample steps --scale=cpu --strategies speed_cvpr25 uniform_v --seeds 0
  python -m benchmarks.speedup.resample guidance --scale=methods --strategies uniform_route sprint_all_tokens
  python -m benchmarks.speedup.resample judges --scale=methods --strategies irepa uniform_route

The comparison draws with few steps of DPM-Solver++, without guidance. `steps` draws with more steps of it, and with the 250
ancestral steps (DDPM) of DiT's paper. `guidance` draws with guidance by the null label, and with that of the run's method: sparse
guidance after a route, path-drop guidance after SPRINT. `judges` draws the comparison's samples, and measures their Fréchet
distance in the features of two judges that were not taught the labels.

Runs whose checkpoints are not in WORKDIR are left out; what OUT has already is not measured again. Writes
OUT/SCALE/QUESTION_SET.json, and the page speedup_SCALE_QUESTION.md beside OUT.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ml_collections

from benchmarks.speedup.data import RAW, ImageSet, add_places, open_set
from benchmarks.speedup.judge import Judge, Panel
from benchmarks.speedup.piece import Evaluation
from benchmarks.speedup.plan import ALL, SCALES, Piece, make_config, pieces
from benchmarks.speedup.report import table
from speedit_jax.errors import UserError
from speedit_jax.sharding import make_mesh
from speedit_jax.storage import write_json, write_text
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.checkpoint import Checkpoints

_DPM = {"sampler": "dpm++", "spacing": "logsnr"}
_STEPS = {f"{steps} steps of dpm++": _DPM | {"num_steps": steps} for steps in (16, 64, 250)}
_STEPS["250 steps of ddpm"] = {"sampler": "ddpm", "spacing": "even", "num_steps": 250}
_OF_METHOD = {
    "route": {"sparse": {"sparse_strong": 0.5, "sparse_weak": 0.9}},
    "sprint": {"path-drop": {"path_drop_guidance": True}},
}
REAL = "held-out real images"
TITLES = {
    "steps": "Do more sampling steps change the comparison?",
    "guidance": "Which guidance after a route, and after SPRINT?",
    "judges": "Do other judges say the same?",
}


def samplings(question: str, config: ml_collections.ConfigDict) -> dict[str, dict]:
    """name -> what it changes of the config's `sampling`."""
    if question == "steps":
        return _STEPS
    kinds = {"null label": {}} | _OF_METHOD.get(config.tokens.method, {})
    guided = {f"{kind}, {w}": {"guidance_scale": w} | keys for kind, keys in kinds.items() for w in (1.5, 2.0, 3.0)}
    return {"unguided": {}} | guided


def complete(workdir: Path, piece: Piece) -> Checkpoints | None:
    """The checkpoints of a run; None where it is not complete."""
    at = workdir / piece.scale / piece.name
    checkpoints = Checkpoints(at) if at.exists() else None
    return checkpoints if checkpoints and checkpoints.latest() == make_config(piece).training.num_steps else None


def restored(piece: Piece, checkpoints: Checkpoints, images: ImageSet, changes: dict) -> tuple[Assembly, Any]:
    """A run, and its last ema.

    Args:
      changes: of the config's `sampling`.
    """
    config = make_config(piece)
    config.sampling.update(changes)
    config.regularizer.align = 0.0  # its head and its teacher are of training alone
    parts = assemble(config, images.train, make_mesh(config.mesh))
    return parts, checkpoints.restore_weights(checkpoints.latest(), "ema", parts.shapes.params, parts.shardings.params)


def measure(question: str, piece: Piece, checkpoints: Checkpoints, images: ImageSet, judge: Judge | Panel) -> dict[str, dict]:
    """Way of sampling -> {"fd", "kid", "accuracy"}, or judge -> {"fd"}."""

    def judged(changes: dict) -> dict:
        parts, ema = restored(piece, checkpoints, images, changes)
        found = Evaluation(parts, images, judge, SCALES[piece.scale])(ema)
        return {name: value for name, value in found.items() if name != "mse"}

    if question == "judges":
        return {name: {"fd": fd} for name, fd in judged({}).items()}
    return {name: judged(changes) for name, changes in samplings(question, make_config(piece)).items()}


def page(question: str, scale: str, found: dict[str, dict[str, dict]]) -> str:
    """Markdown.

    Args:
      found: run -> way of sampling -> what was measured.
    """
    runs = [name.partition("_")[2].rpartition("_seed") for name in found if name != REAL]
    strategies, seeds = (" ".join(dict.fromkeys(run[i] for run in runs)) for i in (0, 2))
    what = "Fréchet distance" if question == "judges" else "Fréchet distance and accuracy"
    columns = list(dict.fromkeys(name for rows in found.values() for name in rows))

    def cell(row: dict) -> str:
        return ", ".join(format(row[key], of) for key, of in (("fd", ".3g"), ("accuracy", ".3f")) if key in row)

    rows = [[run if run == REAL else f"`{run}`", *(cell(of.get(name, {})) for name in columns)] for run, of in found.items()]
    lines = [
        f"# {TITLES[question]}",
        "",
        f"{what} of the final ema of complete runs, from the same noise. The [protocol](speedup_protocol.md)",
        "says what the numbers mean. The script wrote this page, for runs whose checkpoints are there:",
        "",
        f"    python -m benchmarks.speedup.resample {question} --scale={scale} --seeds {seeds} --strategies {strategies}",
        "",
        *table(["", *columns], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(TITLES))
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--strategies", nargs="+", choices=ALL, required=True)
    parser.add_argument("--set", default="fashion", help="image set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RAW, help="raw numbers")
    add_places(parser)
    args = parser.parse_args()
    wanted = [
        piece
        for piece in pieces(args.scale)
        if piece.set == args.set and piece.strategy in args.strategies and piece.seed in args.seeds
    ]
    if not wanted:
        parser.error(f"the scale {args.scale} has no such runs")
    flows = [piece.strategy for piece in wanted if make_config(piece).diffusion.path != "vp"]
    if args.question == "steps" and flows:
        parser.error(f"flows have other samplers; leave out {', '.join(dict.fromkeys(flows))}")
    out = args.out / args.scale / f"{args.question}_{args.set}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    images = open_set(args.set, args.fashion, args.emoji)
    judge = Judge(images, args.out / f"judge_{args.set}.npz", SCALES[args.scale].num_images)
    if args.question == "judges":
        judge = Panel(judge, images, SCALES[args.scale].num_images)
        found[REAL] = {name: {"fd": fd} for name, fd in judge.floor.items()}
    for piece in wanted:
        if piece.name in found or not (checkpoints := complete(args.workdir, piece)):
            continue
        found[piece.name] = measure(args.question, piece, checkpoints, images, judge)
        print(piece.name, found[piece.name], flush=True)
        write_json(out, found)
    write_text(args.out.parent / f"speedup_{args.scale}_{args.question}.md", page(args.question, args.scale, found))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"error: {e}") from e
