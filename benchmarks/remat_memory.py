"""How much memory do the remat policies save under the scan over layers? XLA's count for the compiled gradient; nothing runs.

  python -m benchmarks.remat_memory --out=docs/results/remat_memory.json

The gradient of DiT-S/2 and DiG-S/2, batch 1, float32, 512 pixels (1,024 tokens), on the machine's own platform. FLOPs count the
scanned layers once, so compare them between policies of one model only.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from speedit_jax.config import get_config
from speedit_jax.models.backbone import REMAT_POLICIES
from speedit_jax.models.build import build

IMAGE = (64, 64, 4)


def measure(name: str, remat: str) -> dict[str, float]:
    config = get_config(name).model
    config.update({"remat": remat, "dtype": "float32"})
    model = build(config, image_shape=IMAGE, num_classes=1000, learned_variance=True, platform=jax.default_backend())
    params = jax.eval_shape(model.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    gradient = jax.jit(jax.grad(lambda *args: (model.apply(*args) ** 2).mean()))
    compiled = gradient.lower(params, x, t, t).compile()
    return {
        "temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
        "gflop": round(compiled.cost_analysis()["flops"] / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = {"jax": jax.__version__, "platform": jax.default_backend()}
    for name in ("DiT-S/2", "DiG-S/2"):
        record[name] = {}
        for remat in REMAT_POLICIES:
            record[name][remat] = measure(name, remat)
            print(name, remat, record[name][remat], flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
