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
from speedit_jax.data import loader
from speedit_jax.data.sources import open_source
from speedit_jax.reporting.telemetry import Telemetry
from speedit_jax.training import assembly
from speedit_jax.training.state import initial_state, make_optimizer, state_shardings
from speedit_jax.training.step import make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    config = digits.get_config()
    block, batch_size, num_steps = config.training.log_every, config.training.batch_size, 10**9
    source, mesh = open_source(config.data), sharding.make_mesh(config.mesh)
    diffusion = assembly.make_diffusion(config)
    strategy, optimizer = assembly.make_strategy(config, diffusion), make_optimizer(config)
    model = assembly.make_model(config, mesh, source.image_shape, len(source.class_names))
    key, rows = jax.random.key(config.seed), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        _, shardings = state_shardings(mesh, model, optimizer, strategy)
        state = jax.jit(lambda k: initial_state(model, optimizer, strategy, k), out_shardings=shardings)(key)
    step_of = make_train_step(model, diffusion, strategy, optimizer, config)
    common = {"in_shardings": (shardings, rows, None), "donate_argnums": 0}
    full = jax.jit(step_of, out_shardings=(shardings, None), **common)
    bare = jax.jit(lambda *inputs: step_of(*inputs)[0], out_shardings=shardings, **common)

    local = sharding.local_rows(rows, batch_size)
    batches = (
        {name: sharding.global_array(rows, batch_size, local, values) for name, values in batch.items()}
        for batch in loader.batches(
            source,
            seed=config.seed,
            batch_size=batch_size,
            rows=local,
            first_step=0,
            num_steps=num_steps,
            threads=config.data.threads,
        )
    )
    seconds = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch, jax.set_mesh(mesh):
        telemetry = Telemetry(Path(scratch), first_step=0, num_steps=(args.pairs + 1) * block, batch_size=batch_size)
        timed, step = telemetry.waiting_for(batches), 0
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
                        state = bare(state, next(batches), key)
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
