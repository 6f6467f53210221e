"""How much memory would a training step take on hardware that is not here? The real compilers' count; nothing runs.

  pip install -e '.[tpu,aot-gpu]' && python -m benchmarks.compiled_memory --out=docs/results/compiled_memory.json

The train step (SpeeDiT, AdamW, EMA, bfloat16, batch 1) of DiG-S/2 and DiT-S/2 at 1792 pixels (12,544 tokens) for one H100 and for
one v5e, the same scan over layers and the same remat on both sides, DiT once with plain attention and once with the flash
attention that `model.attention=auto` takes there (cuDNN's, whose workspace is not in the count; Pallas').
"""

import argparse
import json
from pathlib import Path

import jax

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.errors import UserError
from speedit_jax.training import topologies
from speedit_jax.training.assembly import assemble

SIDES = {
    "DiG": {"name": "DiG-S/2"},
    "DiT, plain": {"name": "DiT-S/2", "attention": "xla"},
    "DiT, flash": {"name": "DiT-S/2"},
}
TOPOLOGIES = ("h100", "v5e:2x2")
CLASSES = tuple(map(str, range(1000)))


def measure(topology: str, overrides: dict, remat: str, pixels: int) -> dict[str, float] | str:
    """MiB of arguments and temporaries of one device; or why it does not compile."""
    config = get_config()
    config.model.update({"remat": remat, **overrides})
    config.training.batch_size = 1
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology)[0][:1])
    parts = assemble(config, Description((pixels // 8, pixels // 8, 4), CLASSES), mesh)
    try:
        compiled = parts.lower_step().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return "exceeds the device's memory"
    memory = topologies.measure(compiled)["bytes_per_device"]
    return {name: round(memory[name] / 2**20, 1) for name in ("arguments", "temporaries")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--remat", nargs="+", default=["full", "lean"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--pixels", type=int, default=1792)
    parser.add_argument("--out", type=Path, help="JSON; what is measured is added to what it holds")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"mib": {}}
    record |= {"jax": jax.__version__, "pixels": args.pixels}
    for topology in args.topology:
        for remat in args.remat:
            row = record["mib"].setdefault(topology, {}).setdefault(remat, {})
            for name in args.sides:
                try:
                    row[name] = measure(topology, SIDES[name], remat, args.pixels)
                except UserError as e:
                    raise SystemExit(f"error: {e}") from e
                print(topology, remat, name, row[name], flush=True)
                if args.out:
                    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
