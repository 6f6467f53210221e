"""Does it pay that the middle blocks see fewer tokens, or that losses are added? On the digits, at equal steps and equal FLOPs.

  python -m benchmarks.digits_methods --steps=1500 --seeds=0,1,2 --workdir=runs/methods --out=docs/results/digits_methods.json

Trains configs/digits.py with uniform timesteps and with SpeeDiT, at a constant learning rate, in arms:
  plain
  route        half of the tokens skip the middle blocks (TREAD)
  sprint       three quarters do, and then a second phase with all tokens (SPRINT)
  mask         a second pass, of which 30 % of the tokens are masked (MDT)
  dispersive   the dispersive loss
  align        alignment to the EMA network (SRA)
  features     alignment to the features of an encoder (REPA): of a small classifier of the digits (benchmarks/teacher.py)
  irepa        and with a convolution as its head, and features normalised over the image (iREPA)
  v            v predicted
  flow         a flow that predicts the velocity
  contrastive  and with the contrastive loss
  dig          DiG
  dig_route    and with a route
The first and the last block see all tokens, but in a masked pass only the last one does. A run whose steps have fewer FLOPs than
its baseline's goes on until it has used as many, and one whose steps have more is also measured when it has. A run with SPRINT
spends what it has saved on its second phase, which starts from the EMA of the first. Measured of the EMA, with all tokens in all
blocks: the held-out mse, which does not compare across predictions, and the Fréchet distance of 1,000 unguided samples to the
training digits in pixels. The training loss does not compare.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import methods
from benchmarks.teacher import WIDTH, features_of
from configs.digits import get_config as get_recipe
from speedit_jax import storage
from speedit_jax.config import get_config
from speedit_jax.data.description import DescribedFeatures, Description
from speedit_jax.data.sources import open_source
from speedit_jax.sharding import make_mesh
from speedit_jax.training.assembly import assemble

STRATEGIES = ("uniform", "speedit")
FLOW = {"diffusion.path": "linear", "diffusion.variance": "fixed_small"}
DIG = {"model.name": "DiG-tiny/2"}
ARMS = {
    "plain": {},
    "route": methods.ROUTE,
    "sprint": methods.SPRINT,
    "mask": methods.MASK,
    "dispersive": methods.DISPERSIVE,
    "align": methods.SRA,
    "features": methods.REPA,
    "irepa": methods.IREPA,
    "v": {"diffusion.prediction": "v"},
    "flow": FLOW,
    "contrastive": FLOW | methods.CONTRASTIVE,
    "dig": DIG,
    "dig_route": DIG | methods.CELLS,
}
FEATURED = ("features", "irepa")
BASELINES = {"contrastive": "flow", "dig_route": "dig"}  # of the others it is plain
MODEL = "DiT-tiny/2"
FEATURES = (4, 4, WIDTH)  # of an image, at each of its tokens


def step_flops(settings: dict[str, Any]) -> int:
    config = get_config(MODEL)
    config.update_from_flattened_dict(settings)
    features = DescribedFeatures(FEATURES) if config.regularizer.align_target == "features" else None
    digits = Description((8, 8, 1), tuple("0123456789"), features=features)
    return assemble(config, digits, make_mesh(config.mesh, jax.devices("cpu")[:1])).step_flops


def share_of_flops(arm: str, more: dict[str, Any] | None = None) -> float:
    """Of a step of an arm, with `more` settings, of one of its baseline."""
    return step_flops(ARMS[arm] | (more or {})) / step_flops(ARMS[BASELINES.get(arm, "plain")])


def write_features(directory: Path) -> None:
    """Trains the teacher, and stores what it makes of the digits."""
    features = features_of(open_source(get_recipe(MODEL).data), strides=(1, 2, 1), epochs=20)
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "features.npy", features)
    command = [sys.executable, "-m", "speedit_jax.features", "--data=digits", f"--from_npy={directory / 'features.npy'}"]
    subprocess.run([*command, f"--out={directory / 'features'}"], check=True)


def train(workdir: Path, strategy: str, arm: dict[str, Any], steps: int, until: int, seed: int) -> list[dict]:
    """What was measured at multiples of `steps` and at `until`: [{"step", "fid", "heldout_mse"}]."""
    settings = {
        "seed": seed,
        "timesteps.strategy": strategy,
        "optim.schedule": "constant",
        "training.num_steps": until,
        "training.sample_every": 0,
        "sampling.guidance_scale": 1.0,
        "evaluation.every": steps,
        "evaluation.num_images": 1000,
        "evaluation.batch_size": 250,
        "evaluation.loss_every": steps,
        "evaluation.loss_images": 360,
    } | arm
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "speedit_jax.train", f"--config=configs/digits.py:{MODEL}", f"--workdir={workdir}", *flags]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{"step": row["step"], "fid": row["eval_fid"], "heldout_mse": row["heldout_mse"]} for row in rows if "eval_fid" in row]


def said(row: dict) -> str:
    return f"fid {row['fid']:.3f}, held-out mse {row['heldout_mse']:.4f}"


def measure(workdir: Path, strategy: str, arm: str, steps: int, seed: int) -> list[dict]:
    """The rows of a run, or of both phases of SPRINT, with the FLOPs that they took in steps of its baseline."""
    settings, share = ARMS[arm], share_of_flops(arm)
    if arm in FEATURED:
        settings = settings | {"data.features": str(workdir.parent / "features")}
    first, last = sorted((steps, steps if arm == "sprint" else round(steps / share)))
    rows = train(workdir, strategy, settings, first, last, seed)
    rows = [row | {"dense_steps": row["step"] * share} for row in rows if row["step"] in (first, last)]
    if arm == "sprint":
        share_of_all = share_of_flops(arm, methods.ALL_TOKENS)
        second = round(steps * (1 - share) / share_of_all)
        settings = settings | methods.ALL_TOKENS | {"init_from": str(workdir)}
        (row,) = train(workdir.with_name(f"{workdir.name}_all_tokens"), strategy, settings, second, second, seed)
        rows.append(row | {"step": steps + second, "dense_steps": steps * share + second * share_of_all})
    return rows


def summary(record: dict) -> list[str]:
    """A line for each strategy and arm at equal steps and at equal FLOPs: means over the seeds."""
    lines = []
    for strategy, arm in itertools.product(STRATEGIES, ARMS):
        runs = [run["rows"] for run in record["runs"] if (run["strategy"], run["arm"]) == (strategy, arm)]
        for rows in zip(*runs, strict=True):
            fids, mses = [row["fid"] for row in rows], [row["heldout_mse"] for row in rows]
            lines.append(
                f"{strategy}, {arm}, step {rows[0]['step']}: fid {statistics.mean(fids):.3f}"
                f" ({min(fids):.3f} to {max(fids):.3f}), held-out mse {statistics.mean(mses):.4f}"
                f" ({min(mses):.4f} to {max(mses):.4f})"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the plain runs; more than the 100 of the warm-up")
    parser.add_argument("--seeds", default="0", help="numbers with commas between")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="of these, with commas between")
    parser.add_argument("--arms", default=",".join(ARMS), help="of these, with commas between")
    parser.add_argument("--workdir", type=Path, required=True, help="of the runs, which go on where they are")
    parser.add_argument("--out", type=Path, required=True, help="what it holds of other runs of as many steps stays")
    args = parser.parse_args()
    record = {"model": MODEL, "steps": args.steps, "share_of_flops": {arm: share_of_flops(arm) for arm in ARMS}, "runs": []}
    if args.out.exists() and (old := json.loads(args.out.read_text()))["steps"] == args.steps:
        record["runs"] = old["runs"]
    if {*FEATURED} & {*args.arms.split(",")} and not (args.workdir / "features").exists():
        write_features(args.workdir)
    chosen = (map(int, args.seeds.split(",")), args.strategies.split(","), args.arms.split(","))
    for seed, strategy, arm in itertools.product(*chosen):
        name = f"{strategy}_{arm}_seed{seed}"
        rows = measure(args.workdir / name, strategy, arm, args.steps, seed)
        for row in rows:
            print(f"{name}: step {row['step']} (FLOPs of {row['dense_steps']:.0f} plain steps): {said(row)}")
        run = {"strategy": strategy, "arm": arm, "seed": seed}
        record["runs"] = [old for old in record["runs"] if {key: old[key] for key in run} != run] + [run | {"rows": rows}]
        storage.write_json(args.out, record)
    for line in summary(record):
        print(line)


if __name__ == "__main__":
    main()
