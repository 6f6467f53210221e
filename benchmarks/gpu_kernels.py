"""What do the GPU kernels of GLA become? Registers, spills and tensor-core instructions of the compiled program; nothing runs.

  pip install -e '.[aot-gpu]' && python -m benchmarks.gpu_kernels --out=docs/results/gpu_kernels.json

Compiles forward and backward for DiG-S/2's heads (K = 32, V = 64, 6 heads, bfloat16) for GPUs that are not there, and asks ptxas
about the PTX that XLA dumps; spills are bytes of one thread. `instructions` are those of PTX that a thread goes through, loops
over levels multiplied out: the fewest, of chunks whose gates are bounded, and the most. A proxy, for comparing kernels and
versions: it predicts no speed.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

K, V, HEADS, TOKENS = 32, 64, 6, 1024
ARCHITECTURES = {"h100": "sm_90a", "a100": "sm_80"}
# What tensor cores do, on Hopper and before.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync")


def compile_kernels(topology: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from speedit_jax.kernels import pallas_gpu
    from speedit_jax.training import topologies

    mesh = jax.sharding.Mesh(np.array(topologies.devices(topology)[0]), ("data",))

    def shape(features, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, TOKENS, HEADS, features), dtype)

    def forward(*x):
        return pallas_gpu.gla(*x, scale=1.0, reverse=False)

    inputs = (shape(K), shape(K), shape(V), shape(K, jnp.float32))
    with jax.set_mesh(mesh):
        jax.jit(forward).lower(*inputs).compile()
        jax.jit(lambda d_out, *x: jax.vjp(forward, *x)[1](d_out)).lower(shape(V), *inputs).compile()


LEVELS = 6  # of a chunk of 64 tokens


def instructions(ptx: str, turns: int) -> tuple[int, int]:
    """The fewest and the most instructions from the entry to the end, `turns` times those of every loop.

    A loop is what lies between a label and a branch back to it. Predicated instructions count as executed.
    """
    lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    lines = [line for line in lines if line.endswith((":", ";")) and not line.startswith((".", "//"))]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    weight = [0 if line.endswith(":") else 1 for line in lines]
    jumps = {i: labels[m[1]] for i, line in enumerate(lines) if (m := re.search(r"\bbra(?:\.uni)?\s+(\S+);", line))}
    for i, target in jumps.items():
        for j in range(target, i + 1) if target < i else ():
            weight[j] *= turns
    fewest, most = [0] * (len(lines) + 1), [0] * (len(lines) + 1)
    for i in reversed(range(len(lines))):
        following = {i + 1} if not lines[i].startswith("ret") else set()
        if i in jumps and jumps[i] > i:
            following = following | {jumps[i]} if lines[i].startswith("@") else {jumps[i]}
        fewest[i] = weight[i] + min((fewest[j] for j in following), default=0)
        most[i] = weight[i] + max((most[j] for j in following), default=0)
    return fewest[0], most[0]


def ptxas(*arguments: str) -> str:
    """What the assembler says, of the wheel or of a CUDA that is installed."""
    from speedit_jax.training import topologies

    toolkit = topologies.cuda_toolkit()
    command = [str(Path(toolkit) / "bin" / "ptxas") if toolkit else "ptxas", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


def kernels(dump: Path, architecture: str) -> dict[str, dict[str, int]]:
    """{kernel: what ptxas says of it}, of the Pallas kernels among the PTX files of a dump."""
    found = {}
    for path in sorted(dump.glob("*.ptx")):
        text = path.read_text()
        entry = re.search(r"\.entry (\w+)", text)
        if not entry or not entry[1].endswith("_kernel"):
            continue
        said = ptxas("-v", f"-arch={architecture}", "-o", os.devnull, str(path))
        spilled, read_back = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
        threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", text)[1])
        found[entry[1].strip("_")] = {
            "threads": threads,
            "registers": int(re.search(r"Used (\d+) registers", said)[1]),
            "spill_stores": int(spilled),
            "spill_loads": int(read_back),
            "tensor_core_instructions": sum(text.count(name) for name in TENSOR_CORES),
            "instructions": instructions(text, 1 if "scan" in entry[1] else LEVELS),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=ARCHITECTURES, default="h100")
    parser.add_argument("--out", type=Path, help="JSON, to which each topology is added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ |= {"XLA_FLAGS": f"--xla_dump_to={dump}", "JAX_PLATFORMS": "cpu"}
        compile_kernels(args.topology)
        record = {
            "jax": metadata.version("jax"),
            "ptxas": re.search(r"V([\d.]+)", ptxas("--version"))[1],
            "shape": {"K": K, "V": V, "heads": HEADS, "chunk": 64},
            "kernels": kernels(Path(dump), ARCHITECTURES[args.topology]),
        }
    if len(record["kernels"]) != 5:
        raise SystemExit(f"error: XLA's dump does not name the kernels as it did: {', '.join(record['kernels'])}")
    print(json.dumps(record, indent=1))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(known | {args.topology: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
