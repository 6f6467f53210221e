"""What share of a training step does telemetry cost? Goal: under 2 %.

  python -m benchmarks.telemetry_cost --out=docs/results/telemetry_cost.json

The digits config's loop, data included, in pairs of blocks of training.log_every steps: one block as in train.py, with all that
the step measures (losses by quartile, norms), metrics.jsonl, TensorBoard and the bar; and one without telemetry, whose step
returns nothing but the state, so that XLA leaves out what only telemetry wants. Which comes first alternates. A block ends when
the device has done its work.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import digits
from speedit_jax import sharding
from speedit_jax.data.sources import open_source
from speedit_jax.reporting.telemetry import Telemetry
from speedit_jax.training.assembly import assemble
from speedit_jax.training.batches import batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    config = digits.get_config()
    block, batch_size, num_steps = config.training.log_every, config.training.batch_size, 10**9
    source, mesh = open_source(config.data), sharding.make_mesh(config.mesh)
    parts, key = assemble(config, source, mesh), jax.random.key(config.seed)
    state, full = parts.initial_state(key), parts.jit_step()
    bare = jax.jit(lambda *inputs: full(*inputs)[0], out_shardings=parts.shardings, donate_argnums=0)
    loaded = batches(parts, source, 0, num_steps)
    seconds = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch, jax.set_mesh(mesh):
        telemetry = Telemetry(Path(scratch), first_step=0, num_steps=(args.pairs + 1) * block, batch_size=batch_size)
        timed, step = telemetry.waiting_for(loaded), 0
        for pair in range(args.pairs + 1):
            for which in ("with", "without") if pair % 2 else ("without", "with"):
                jax.block_until_ready(state)
                since = time.perf_counter()
                for _ in range(block):
                    if which == "with":
                        state, metrics = full(state, next(timed), key)
                        step += 1
                        telemetry.step(step)
                        if step % block == 0:
                            telemetry.metrics(step, metrics)
                    else:
                        state = bare(state, next(loaded), key)
                jax.block_until_ready(state)
                if pair:  # the first one compiles
                    seconds[which].append((time.perf_counter() - since) / block)
        telemetry.close()

    times = {which: np.array(values) for which, values in seconds.items()}
    shares = times["with"] / times["without"] - 1
    record = {
        "share_of_a_step": {
            "median": float(np.median(shares)),
            "mean": float(shares.mean()),
            "standard_error": float(shares.std(ddof=1) / len(shares) ** 0.5),
            "quartiles": np.quantile(shares, (0.25, 0.75)).tolist(),
        },
        "seconds_per_step": {which: float(np.median(values)) for which, values in times.items()},
        "pairs": args.pairs,
        "steps_a_block": block,
        "batch_size": batch_size,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
