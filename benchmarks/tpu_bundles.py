"""How many instructions do the TPU kernels of GLA and of attention take? A count of the compiled program, not a time.

  pip install libtpu==0.0.42.1 && python -m benchmarks.tpu_bundles --out=docs/results/tpu_bundles.json

Compiles forward and backward for the heads of DiG-S/2 (K = 32, V = 64) and DiT-S/2 (64), 6 heads, bfloat16, for a v5e that is
not there, lets libtpu dump its final schedule, and multiplies the bundles of each kernel's grid step by the steps of its grid. A
bundle is a cycle at least; stalls of memory are not in it, nor is what XLA does around the kernels. It is for comparing kernels
and versions, and predicts no speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HEADS = 6
FEATURES = {"gla": (32, 32, 64), "attention": (64, 64, 64)}  # of q, k and v
SIDES = (1792, 2048)  # pixels; a token is 16 of them wide


def compile_mixer(mixer: str, topology: str, tokens: int) -> None:
    import jax
    import jax.numpy as jnp

    from speedit_jax.kernels import pallas_tpu
    from speedit_jax.models.attention import attention
    from speedit_jax.training import topologies

    sharding = jax.sharding.SingleDeviceSharding(topologies.devices(topology)[0][0])

    def shape(features, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, tokens, HEADS, features), dtype, sharding=sharding)

    def forward(*x):
        return pallas_tpu.gla(*x, scale=1.0, reverse=False) if mixer == "gla" else attention(*x, "pallas", None, None)

    inputs = [shape(features) for features in FEATURES[mixer]]
    if mixer == "gla":
        inputs.append(shape(FEATURES[mixer][0], jnp.float32))
    jax.jit(forward).lower(*inputs).compile()
    jax.jit(lambda d_out, *x: jax.vjp(forward, *x)[1](d_out)).lower(shape(FEATURES[mixer][2]), *inputs).compile()


def dumped(mixer: str, topology: str, tokens: int) -> dict[str, int]:
    """{kernel: bundles of a grid step}, of a process of its own: libtpu reads its flags once."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        code = f"from benchmarks import tpu_bundles; tpu_bundles.compile_mixer({mixer!r}, {topology!r}, {tokens})"
        env = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", code], env=env, check=True)
        return {
            path.name.split("-", 1)[1]: int(re.search(r"total scheduled bundles\D*(\d+)", path.read_text())[1])
            for path in sorted(Path(dump).glob("*schedule-analysis_final_bundles.txt"))
        }


def cycles(mixer: str, topology: str, tokens: int) -> dict[str, float]:
    """{"forward", "backward": bundles a token and head}."""
    from speedit_jax.kernels.pallas_tpu import CHUNK
    from speedit_jax.models.attention import flash_block

    found = {"forward": 0, "backward": 0}
    for name, bundles in dumped(mixer, topology, tokens).items():
        # Named after the traced functions; the rest is XLA's own.
        if name.startswith(("jit_forward", "forward", "flash_attention", "jit_flash_attention")) or "-forward" in name:
            found["forward"] += bundles
        elif "transpose_jvp" in name or name.startswith("flash_mha_bwd"):
            found["backward"] += bundles
    if not all(found.values()):
        raise SystemExit("error: libtpu's dump does not name the kernels as it did")
    # Of a head: a step of GLA is a chunk of all six.
    steps = -(-tokens // CHUNK) / HEADS if mixer == "gla" else (-(-tokens // flash_block(tokens))) ** 2
    return {name: round(bundles * steps / tokens, 2) for name, bundles in found.items()}


def block_costs(topology: str) -> dict[int, float]:
    """Block of JAX's flash attention -> bundles of a pair of tokens, forward and backward, relative to the largest block's."""
    from speedit_jax.models.attention import FLASH_BLOCKS

    bundles = {}
    for block in FLASH_BLOCKS:
        # As many tokens as a block, for which `flash_block` chooses it.
        found = dumped("attention", topology, block)
        bundles[block] = sum(n for name, n in found.items() if name.startswith(("flash_attention", "flash_mha_bwd"))) / block**2
    return {block: round(n / bundles[max(bundles)], 2) for block, n in bundles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = {
        "topology": args.topology,
        "jax": metadata.version("jax"),
        "libtpu": metadata.version("libtpu"),
        "heads": HEADS,
        "features": FEATURES,
        "bundles_per_token_and_head": {
            f"{pixels} px": {mixer: cycles(mixer, args.topology, (pixels // 16) ** 2) for mixer in FEATURES} for pixels in SIDES
        },
        "attention_bundles_of_a_pair_by_block": block_costs(args.topology),
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
