"""Where does the time of a training step on a GPU go? Read off the compiled program; no GPU is needed, and nothing runs.

  pip install -e '.[aot-gpu]' && python -m benchmarks.gpu.step_model --out=docs/results/gpu_step_model.json

Compiles the training step (SpeeDiT, AdamW, EMA, bfloat16, latents of an eighth of the pixels) for one H100 as
`python -m speedit_jax.aot` does, and counts for each of its kernels, loops multiplied out, the bytes that it reads and writes and
its operations. The model of a kernel's time is

  max(bytes / bandwidth, FLOPs of matrix products / rate, other operations / their rates) + a launch

with no credit for what the cache still holds, and no loss for kernels that reach less than the rates. So it shows what a step
is made of and what a change saves, rather than how long a step takes: compare it with measurements before you trust a number.
Matrix products appear as Triton kernels, because without a GPU nothing is timed and cuBLAS is not chosen; their bytes and FLOPs
are the same.

Each variant is a side by side of settings: NAME=MODEL:PIXELS:BATCH[:key=value,...], the keys of the config's `model` section:

  python -m benchmarks.gpu.step_model --variants lean=DiG-S/2:1792:1:remat=lean unrolled=DiG-S/2:1792:1:scan_unroll=12 --out=OUT
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.hlo import parse
from benchmarks.gpu.kernels import MOVES, Kernel, Reader, handwritten
from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.errors import UserError
from speedit_jax.training import topologies, traffic
from speedit_jax.training.assembly import Assembly, assemble

CLASSES = 1000
DEFAULT_VARIANTS = (
    "none=DiG-S/2:1792:1",
    "lean=DiG-S/2:1792:1:remat=lean",
    "unrolled=DiG-S/2:1792:1:scan_unroll=12",
    "DiT=DiT-S/2:1792:1",
    "DiT, lean=DiT-S/2:1792:1:remat=lean",
)


@dataclasses.dataclass(frozen=True)
class Card:
    """Rates a second.

    Attributes:
      bandwidth: bytes that a copy read and wrote.
      products: FLOPs of a large bfloat16 product.
      vector: float32 operations other than fused multiply-adds, half of the data sheet's FLOPs.
      transcendental: exp and the like, 16 a clock and multiprocessor.
      launch: seconds from one kernel's end to the next one's start, and to fill the chip. An estimate.
    """

    bandwidth: float
    products: float
    vector: float = 33.5e12
    transcendental: float = 132 * 16 * 1.98e9
    launch: float = 2e-6


# The first two were measured, on one card of each kind: a large copy, and a product of 8192 x 8192 matrices.
CARDS = {"h100": Card(3.0e12, 798e12), "h200": Card(4.3e12, 788e12)}

_SCAN_OPERATIONS = ("add", "add_any", "pad", "slice", "exp", "reduce_sum")
# The first that matches where a kernel comes from names its part of the step.
PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("loss and diffusion", lambda o: "jvp()" in o),
    ("depthwise 3x3", lambda o: "/conv/" in o),
    ("GLA's output norm", lambda o: "/out_norm/" in o),
    ("GLA's output gate", lambda o: "/attention/jit(silu)" in o or o.endswith("/attention/mul")),
    ("forget gates", lambda o: "log_sigmoid" in o or "/gate_up/" in o),
    (
        "GLA's state scan, attention's biases",
        lambda o: "/attention/" in o and o.rpartition("/")[2] in _SCAN_OPERATIONS,
    ),
    ("SwiGLU or GELU", lambda o: "/mlp/" in o),
    ("adaLN", lambda o: "adaLN" in o or "/timestep/" in o or "/label/" in o),
    ("norm, modulate, residual", lambda o: "/while/body/" in o or "/blocks/" in o),
    ("patches and last layer", lambda o: "Backbone" in o),
    ("optimizer, EMA, metrics, draws", lambda o: True),
)


def part(kernel: Kernel) -> str:
    if kernel.target and "fmha" in kernel.target:
        return "softmax attention"
    if kernel.target and not kernel.target.startswith("__"):
        return "GLA's kernels"
    if kernel.work.products:
        return "matrix products"
    if not kernel.reads:
        return "filling stacks with zeros"
    if kernel.opcodes <= MOVES:
        return "copies to and from stacks" if kernel.stacked else "other copies and transposes"
    totals: dict[str, int] = {}
    for origin, size in kernel.origins.items():
        name = next(name for name, matches in PARTS if matches(origin))
        totals[name] = totals.get(name, 0) + size
    return max(totals, key=totals.get)


def seconds(kernel: Kernel, card: Card) -> float:
    """Of all its calls in a step."""
    work = kernel.work
    times = (
        (kernel.reads + kernel.writes) / card.bandwidth,
        work.products / card.products,
        work.vector / card.vector,
        work.transcendental / card.transcendental,
    )
    return kernel.calls * (max(times) + card.launch)


def make_parts(variant: str, devices: list[Any]) -> Assembly:
    """Of "MODEL:PIXELS:BATCH[:key=value,...]"."""
    name, pixels, batch, *rest = variant.split(":")
    config = get_config(name)
    for setting in filter(None, ",".join(rest).split(",")):
        key, _, value = setting.partition("=")
        config.model[key] = type(config.model[key])(value)
    config.training.batch_size = int(batch)
    shape = (int(pixels) // 8, int(pixels) // 8, 4)
    return assemble(config, Description(shape, tuple(map(str, range(CLASSES)))), sharding.make_mesh(config.mesh, devices))


def compiled_step(parts: Assembly) -> tuple[jax.stages.Compiled, dict]:
    """The step, and the work of each Pallas kernel in it."""
    step, key = parts.jit_step(), jax.eval_shape(jax.random.key, 0)
    with jax.set_mesh(parts.mesh):
        traced = step.trace(parts.shapes, parts.batch_shapes(), key)
        return traced.lower().compile(), handwritten(traced.jaxpr.jaxpr)


def describe(kernels: list[Kernel], top: int) -> dict[str, Any]:
    """Totals of a step, by part and of its largest kernels."""
    by_part: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        row = by_part.setdefault(
            part(kernel), {"launches": 0, "bytes": 0, "stacked_bytes": 0, "product_flops": 0, **{f"{c}_ms": 0.0 for c in CARDS}}
        )
        row["launches"] += kernel.calls
        row["bytes"] += kernel.calls * (kernel.reads + kernel.writes)
        row["stacked_bytes"] += kernel.calls * kernel.stacked
        row["product_flops"] += kernel.calls * kernel.work.products
        for name, card in CARDS.items():
            row[f"{name}_ms"] += 1e3 * seconds(kernel, card)
    ordered = dict(sorted(by_part.items(), key=lambda item: -item[1]["h100_ms"]))
    total = {key: sum(row[key] for row in ordered.values()) for key in next(iter(ordered.values()))}
    largest = sorted(kernels, key=lambda k: -seconds(k, CARDS["h100"]))[:top]
    return {
        "total": _rounded(total),
        "parts": {name: _rounded(row) for name, row in ordered.items()},
        "largest_kernels": [
            {
                "kernel": kernel.target or kernel.name,
                "part": part(kernel),
                "from": max(kernel.origins, key=kernel.origins.get).rpartition("while/body/")[2],
                "calls": kernel.calls,
                "reads": kernel.reads,
                "writes": kernel.writes,
                "dtypes": " ".join(kernel.dtypes),
                "h100_ms": round(1e3 * seconds(kernel, CARDS["h100"]), 3),
            }
            for kernel in largest
        ],
    }


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def table(name: str, found: dict[str, Any]) -> str:
    """Markdown."""
    total = found["total"]
    lines = [f"{name}: {found['variant']}", ""]
    lines += [
        "| part | launches | GB | of it stacked | TFLOP of products | H100, ms | H200, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in [*found["parts"].items(), ("**all**", total)]:
        cells = [row["launches"], f"{row['bytes'] / 1e9:.2f}", f"{row['stacked_bytes'] / 1e9:.2f}"]
        cells += [f"{row['product_flops'] / 1e12:.2f}", f"{row['h100_ms']:.2f}", f"{row['h200_ms']:.2f}"]
        lines.append("| " + " | ".join(map(str, [title, *cells])) + " |")
    return "\n".join([*lines, "", f"temporaries {found['temporaries_bytes'] / 2**30:.2f} GiB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, metavar="NAME=MODEL:PIXELS:BATCH[:key=value,...]")
    parser.add_argument("--topology", default="h100", choices=list(topologies.GPUS))
    parser.add_argument("--top", type=int, default=25, help="largest kernels to list")
    parser.add_argument("--out", type=Path, help="JSON; what is measured is added to what it holds")
    parser.add_argument("--text", type=Path, help="folder for the compiled programs' text")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"variants": {}}
    record |= {"topology": args.topology, "cards": {name: dataclasses.asdict(card) for name, card in CARDS.items()}}
    try:
        devices, _ = topologies.devices(args.topology)
        for given in args.variants:
            name, _, variant = given.partition("=")
            compiled, work = compiled_step(make_parts(variant, devices))
            text = compiled.as_text()
            if args.text:
                args.text.mkdir(parents=True, exist_ok=True)
                (args.text / f"{name.replace(', ', '_')}.txt").write_text(text)
            module, entry = parse(text)
            memory = compiled.memory_analysis()
            found = {"variant": variant, "jax": jax.__version__, "temporaries_bytes": memory.temp_size_in_bytes}
            found |= {"collectives": len(list(traffic.collectives(text)))}
            found |= describe(list(Reader(module, work).kernels(entry)), args.top)
            record["variants"][name] = found
            print(table(name, found), end="\n\n", flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    except UserError as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
