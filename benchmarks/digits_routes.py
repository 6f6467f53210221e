"""Does it pay that tokens skip the middle blocks (tokens.method=route)? On the digits, at equal steps and at equal FLOPs.

  python -m benchmarks.digits_routes --steps=1500 --seeds=0,1,2 --workdir=runs/routes --out=docs/results/digits_routes.json

Trains configs/digits.py with uniform timesteps and with SpeeDiT, each with and without a route, at a constant learning rate. The
first and the last block see all tokens, and half of the tokens skip the two between. The runs with a route go on until they have
used as many FLOPs as the others. Measured at --steps and at the end, of the EMA, with all tokens in all blocks: the held-out mse,
and the Fréchet distance of 1,000 unguided samples to the training digits in pixels. The training loss does not compare: half of
the tokens make it harder.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from speedit_jax import storage
from speedit_jax.config import get_config
from speedit_jax.models.build import build

STRATEGIES = ("uniform", "speedit")
ROUTE = {"tokens.method": "route", "tokens.start": 1, "tokens.tail": 1}
MODEL = "DiT-tiny/2"


def share_of_flops() -> float:
    """Of a step with the route, of one without."""
    config = get_config(MODEL)
    config.update_from_flattened_dict(ROUTE)
    common = {"image_shape": (8, 8, 1), "num_classes": 10, "learned_variance": True, "platform": "cpu"}
    model = build(config.model, tokens=config.tokens, **common)
    return model.step_flops / (3 * model.forward_flops)


def train(workdir: Path, strategy: str, routed: bool, steps: int, until: int, seed: int) -> list[dict]:
    """What was measured at `steps` and, if that is later, at `until`: [{"step", "fid", "heldout_mse"}]."""
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
    } | (ROUTE if routed else {})
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "speedit_jax.train", f"--config=configs/digits.py:{MODEL}", f"--workdir={workdir}", *flags]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{"step": row["step"], "fid": row["eval_fid"], "heldout_mse": row["heldout_mse"]} for row in rows if "eval_fid" in row]


def said(row: dict) -> str:
    return f"fid {row['fid']:.3f}, held-out mse {row['heldout_mse']:.4f}"


def summary(record: dict) -> list[str]:
    """A line for each strategy, with and without the route, at equal steps and at equal FLOPs: means over the seeds."""
    lines = []
    for strategy, routed in itertools.product(STRATEGIES, (False, True)):
        runs = [run["rows"] for run in record["runs"] if (run["strategy"], run["routed"]) == (strategy, routed)]
        for rows in zip(*runs, strict=True):
            fids, mses = [row["fid"] for row in rows], [row["heldout_mse"] for row in rows]
            lines.append(
                f"{strategy}{', route' if routed else ''}, step {rows[0]['step']}: fid {statistics.mean(fids):.3f}"
                f" ({min(fids):.3f} to {max(fids):.3f}), held-out mse {statistics.mean(mses):.4f}"
                f" ({min(mses):.4f} to {max(mses):.4f})"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the runs without a route; more than the 100 of the warm-up")
    parser.add_argument("--seeds", default="0", help="numbers with commas between")
    parser.add_argument("--workdir", type=Path, required=True, help="of the runs, which go on where they are")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    share, seeds = share_of_flops(), [int(seed) for seed in args.seeds.split(",")]
    record = {"model": MODEL, "steps": args.steps, "share_of_flops": share, "runs": []}
    for seed, strategy, routed in itertools.product(seeds, STRATEGIES, (False, True)):
        until = round(args.steps / share) if routed else args.steps
        name = f"{strategy}{'_route' if routed else ''}_seed{seed}"
        rows = train(args.workdir / name, strategy, routed, args.steps, until, seed)
        for row in rows:
            row["dense_steps"] = row["step"] * (share if routed else 1)
            print(f"{name}: step {row['step']} (FLOPs of {row['dense_steps']:.0f} dense steps): {said(row)}")
        record["runs"].append({"strategy": strategy, "routed": routed, "seed": seed, "rows": rows})
        storage.write_json(args.out, record)
    for line in summary(record):
        print(line)


if __name__ == "__main__":
    main()
