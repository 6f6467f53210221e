"""What do the mixers cost on the accelerator that is here? Gated linear attention against softmax attention, as tokens grow.

  python -m benchmarks.mixers --out=docs/results/mixers.json

One layer's mixer in bfloat16, forward and forward with backward, for the heads of DiG and DiT of one size (S: 6 heads, GLA with
K = 32 and V = 64, attention with 64; XL: 18 heads of the same, attention 16 heads of 72):
  gla          what model.gla=auto takes here
  gla, xla     the chunked form as plain XLA
  attention    what model.attention=auto takes here, in bfloat16
Each side runs --calls times without waiting in between, all sides in turn, --rounds times; a table of medians in microseconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.kernels.gla import choose_gla, gla
from speedit_jax.models.attention import attention, choose_attention
from speedit_jax.models.build import SIZES

PASSES = ("forward", "backward")


def random_inputs(batch: int, tokens: int, size: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width, _, h = SIZES["DiG"][size]
    v = width // h
    shapes = dict.fromkeys(("q", "k", "log_g"), (h, v // 2)) | dict.fromkeys(("v", "d_out"), (h, v))
    width, _, h = SIZES["DiT"][size]
    shapes |= {f"attention_{name}": (h, width // h) for name in ("q", "k", "v", "d_out")}
    arrays = {name: rng.standard_normal((batch, tokens, *shape), dtype=np.float32) for name, shape in shapes.items()}
    return arrays | {"log_g": -np.logaddexp(0, -arrays["log_g"]) / 16}


def make_sides(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Callable[[], jax.Array]]]:
    """side -> pass -> a call that returns before the device is done."""
    platform = jax.default_backend()
    x = {name: jnp.asarray(a, jnp.float32 if name == "log_g" else jnp.bfloat16) for name, a in arrays.items()}
    linear = [x[name] for name in ("q", "k", "v", "log_g")]
    softmax = [x[f"attention_{name}"] for name in ("q", "k", "v")]
    chosen = choose_attention("auto", platform, jnp.bfloat16, softmax[0].shape[-1])

    def side(f, inputs, d_out):
        def backward(d_out, *inputs):
            out, pullback = jax.vjp(f, *inputs)
            return out, *pullback(d_out)

        forward, backward = jax.jit(f), jax.jit(backward)
        return {"forward": lambda: forward(*inputs), "backward": lambda: backward(d_out, *inputs)}

    found = {}
    for name, implementation in {"gla": choose_gla("auto", platform), "gla, xla": "xla"}.items():
        found[name] = side(lambda *x, i=implementation: gla(*x, implementation=i), linear, x["d_out"])
    return found | {"attention": side(lambda *x: attention(*x, chosen, None, None), softmax, x["attention_d_out"])}


def seconds(call: Callable, calls: int) -> float:
    """Of one call."""
    since = time.perf_counter()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - since) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES["DiG"]), default=["S", "XL"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="of an image")
    parser.add_argument("--total", type=int, default=65536, help="tokens of a batch")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()

    rows = []
    for size in args.sizes:
        for tokens in args.tokens:
            batch = max(1, args.total // tokens)
            sides = make_sides(random_inputs(batch, tokens, size))
            row = {"size": size, "tokens": tokens, "batch": batch, "microseconds": {}}
            for which in PASSES:
                runs = {name: [] for name in sides}
                for i in range(args.rounds + 1):
                    for name, side in sides.items():
                        found = seconds(side[which], args.calls if i else 1)
                        if i:  # not the one that compiles
                            runs[name].append(1e6 * found)
                row["microseconds"][which] = {name: round(float(np.median(times)), 1) for name, times in runs.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)

    record = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    names = list(rows[0]["microseconds"]["forward"])
    print(f"\nmicroseconds a call; jax {jax.__version__}, {record['device']}\n")
    print("| | tokens | batch | pass | " + " | ".join(names) + " |\n" + "|---" * (4 + len(names)) + "|")
    for row in rows:
        for which in PASSES:
            cells = [row["size"], f"{row['tokens']:,}", row["batch"], which]
            print("|", " | ".join(map(str, [*cells, *(f"{row['microseconds'][which][name]:,.0f}" for name in names)])), "|")


if __name__ == "__main__":
    main()
