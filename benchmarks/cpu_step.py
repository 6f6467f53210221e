"""Where does the time of a training step on a CPU go? Parts of XLA's own trace, CPU seconds and memory.

  python -m benchmarks.cpu_step --out=docs/results/cpu_step.json
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.cpu_step

The training step of DiT-S/2 at 256 pixels (latents 32 x 32 x 4), float32, SpeeDiT, AdamW, EMA, on random latents. One step warms
up, --steps are timed, and one more is traced. CPU seconds are those of all threads. System seconds are those of them that the
kernel took, mostly to provide zeroed pages. Shares are of the traced time of XLA's thunks, added up over threads.
"""

import argparse
import collections
import gzip
import json
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.training.assembly import Assembly, assemble

LATENTS, CLASSES = (32, 32, 4), 1000
# The first word that is in a thunk's name names its part.
PARTS = {
    "ynn": "matrix products and sums",
    "dot": "matrix products and sums",
    "wrapped_broadcast": "filling with zeros",
    "dynamic": "copies to and from stacks",
    "copy": "other copies and transposes",
    "transpose": "other copies and transposes",
    "": "elementwise and the rest",
}


def part(thunk: str) -> str | None:
    """None of a loop, which is the time of what is in it."""
    if thunk.startswith(("while", "call", "conditional")):
        return None
    return next(name for word, name in PARTS.items() if word in thunk)


def make_parts(name: str, batch_size: int, settings: list[str]) -> Assembly:
    config = get_config(name)
    for key, _, value in (setting.partition("=") for setting in settings):
        config.model[key] = type(config.model[key])(value)
    config.training.batch_size = batch_size
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return assemble(config, Description(LATENTS, tuple(map(str, range(CLASSES)))), mesh)


def shares(folder: Path) -> dict[str, float]:
    """Of the parts in a profiler's trace, the largest first."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(path) as f:
        events = json.load(f)["traceEvents"]
    times = collections.Counter()
    for event in events:
        thunk = event.get("args", {}).get("hlo_op")
        if thunk and event["ph"] == "X" and (name := part(thunk)):
            times[name] += event["dur"]
    return {name: time / times.total() for name, time in times.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config's section `model`")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    parts, key, rng = make_parts(args.model, args.batch_size, args.set), jax.random.key(0), np.random.default_rng(0)
    image = rng.standard_normal((args.batch_size, *LATENTS), dtype=np.float32)
    batch = {"image": image, "label": rng.integers(0, CLASSES, args.batch_size, dtype=np.int32)}
    batch = {name: jax.device_put(values, parts.rows) for name, values in batch.items()}
    state = parts.initial_state(key)
    with jax.set_mesh(parts.mesh), tempfile.TemporaryDirectory() as folder:
        step = parts.jit_step().lower(state, batch, key).compile()

        def run():
            nonlocal state
            state, metrics = step(state, batch, key)
            jax.block_until_ready((state, metrics))

        run()
        rounds = []
        for _ in range(args.steps):
            since = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
            run()
            now = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
            rounds.append([round(b - a, 3) for a, b in zip(since, now, strict=True)])
        with jax.profiler.trace(folder):
            run()
        found = shares(Path(folder))
    record = {
        "jax": jax.__version__,
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "temporaries_mib": step.memory_analysis().temp_size_in_bytes >> 20,
        "cpu_seconds": [total for total, _ in rounds],
        "system_seconds": [system for _, system in rounds],
        "shares": {name: round(share, 3) for name, share in found.items()},
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
