"""How many instructions do the TPU kernels of GLA take a token and head? A count of the compiled program, not a time.

  pip install libtpu==0.0.52 && python -m benchmarks.tpu_bundles --out=docs/results/tpu_bundles.json

Compiles forward and backward for DiG-S/2's heads (K = 32, V = 64, 6 heads, bfloat16) for a v5e that is not there, lets libtpu
dump its final schedule, and divides the bundles of each kernel by the tokens and heads of a grid step. A bundle is a cycle at
least; stalls of memory are not in it. It is for comparing kernels and versions, and predicts no speed.
"""

import argparse
import json
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

K, V, HEADS, TOKENS = 32, 64, 6, 1024
CHUNK = 128  # tokens a grid step; kernels/pallas_tpu.py


def compile_kernels(topology: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from speedit_jax.kernels import pallas_tpu
    from speedit_jax.training import deviceless

    mesh = Mesh(np.array(deviceless.devices(topology)[0][:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def shape(features, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, TOKENS, HEADS, features), dtype, sharding=sharding)

    def forward(*x):
        return pallas_tpu.gla(*x, scale=1.0, reverse=False)

    inputs = (shape(K), shape(K), shape(V), shape(K, jnp.float32))
    with jax.set_mesh(mesh):
        jax.jit(forward).lower(*inputs).compile()
        jax.jit(lambda d_out, *x: jax.vjp(forward, *x)[1](d_out)).lower(shape(V), *inputs).compile()


def bundles(dump: Path) -> dict[str, int]:
    """{"forward", "backward": bundles of a grid step of all kernels of that pass}."""
    found = {"forward": 0, "backward": 0}
    for path in dump.glob("*schedule-analysis_final_bundles.txt"):
        count = re.search(r"total scheduled bundles\D*(\d+)", path.read_text())
        # Named after the traced functions; the rest are the program's own beginning and end.
        if "-forward" in path.name:
            found["forward"] += int(count[1])
        elif "-transpose_jvp" in path.name:
            found["backward"] += int(count[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        os.environ["JAX_PLATFORMS"] = "cpu"
        compile_kernels(args.topology)
        counts = bundles(Path(dump))
    if not all(counts.values()):
        raise SystemExit(f"error: libtpu's dump does not name the kernels as it did: {counts}")
    per_token_and_head = {name: round(count / (CHUNK * HEADS), 2) for name, count in counts.items()}
    record = {
        "topology": args.topology,
        "jax": metadata.version("jax"),
        "libtpu": metadata.version("libtpu"),
        "shape": {"K": K, "V": V, "heads": HEADS, "chunk": CHUNK},
        "bundles_per_step": counts,
        "bundles_per_token_and_head": per_token_and_head,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
