"""docs/results/gpu.md and its figure, from the records of visits and from the static model; what is missing says so.

python -m benchmarks.gpu.page docs/results/gpu.jsonl --model=docs/results/gpu_step_model.json --out=docs/results/gpu
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan as plans
from benchmarks.gpu.record import read

MISSING = "not measured yet"


class Records:
    """The newest good record of each id, and all others by kind."""

    def __init__(self, found: list[dict[str, Any]]):
        self.all = found
        self._by_id = {record["id"]: record for record in found if record.get("id") and not record.get("error")}
        self._failed = {record["id"]: record["error"] for record in found if record.get("id") and record.get("error")}

    def get(self, id_: str) -> dict[str, Any] | None:
        return self._by_id.get(id_)

    def median(self, id_: str) -> float | None:
        """Seconds."""
        record = self.get(id_)
        return statistics.median(record["seconds"]) if record else None

    def cell(self, id_: str, show) -> str:
        """A cell of a table; of a measurement that failed, why."""
        if record := self.get(id_):
            return show(record)
        # Of what did not compile, neither pass was tried.
        failed = self._failed.get(id_) or self._failed.get(id_.rpartition("/")[0])
        return (failed or MISSING).replace("|", "/")

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.all if record["kind"] == kind]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a and b else MISSING


def milliseconds(record: dict[str, Any]) -> str:
    times = [1e3 * s for s in record["seconds"]]
    return f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"


def machines(records: Records) -> str:
    shown = []
    for visit in records.kind("visit"):
        if visit.get("rehearsal"):
            shown.append("A rehearsal on a CPU: none of these numbers means anything.")
        versions = ", ".join(f"{name} {version}" for name, version in visit["versions"].items() if version)
        card = (visit["card"] or {}).get("name", "no GPU")
        shown.append(
            f"{visit['utc'][:10]}: {card}, Python {visit['python']}, {versions}; commit {(visit['commit'] or '?')[:12]}."
        )
    if ceiling := records.get("ceiling"):
        rates = f"{ceiling['copy_bytes_per_s'] / 1e12:.2f} TB/s, {ceiling['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"
        shown.append(f"A large copy and a large bfloat16 product reached {rates}.")
    return "\n".join(shown) or f"Machine: {MISSING}."


def values(records: Records) -> str:
    rows = []
    for name, title in (("values", "kernels against their definition"), ("resume", "killed and resumed: the same bits")):
        show = lambda r: f"{r['passed']} passed, {len(r['failed'])} failed" + "".join(f"; {test}" for test in r["failed"])  # noqa: E731
        rows.append([title, records.cell(f"tests/{name}", show)])
    return table(["value tests (`pytest -m gpu`)", "result"], rows)


def steps(records: Records, plan: plans.Plan) -> str:
    rows = []
    for step in (*plan.steps, *plan.torch_steps):
        settings = ", ".join(f"{key}={value}" for key, value in step.settings)
        mfu = records.cell(step.id, lambda r: f"{r['mfu']:.0%}" if "mfu" in r else "")
        images = records.cell(step.id, lambda r: f"{r['images_per_s']:.1f}")
        memory = records.cell(step.id, lambda r: f"{(r.get('peak_bytes') or r.get('temp_bytes') or 0) / 2**30:.2f}")
        time = records.cell(step.id, milliseconds)
        cells = [step.side, step.model, str(step.pixels), str(step.batch), settings, time, images, mfu, memory]
        rows.append(cells if records.get(step.id) else [*cells[:5], time, "", "", ""])
    head = ["side", "model", "pixels", "batch", "settings", "ms per step", "images/s", "share of the peak", "GiB"]
    return table(head, rows)


def mixers(records: Records, plan: plans.Plan) -> str:
    rows = []
    for mixer in (*plan.mixers, *plan.torch_mixers):
        shape = f"{mixer.batch} x {mixer.tokens:,}, {mixer.heads} heads, {mixer.key}/{mixer.value}"
        rows.append(
            [mixer.side, shape, *(records.cell(f"{mixer.id}/{which}", milliseconds) for which in ("forward", "backward"))]
        )
    return table(["side", "batch x tokens, heads, K/V", "forward, ms", "forward and backward, ms"], rows)


def samples(records: Records, plan: plans.Plan) -> str:
    rows = []
    for sample in plan.samples:
        show = lambda r: f"{r['images_per_s']:.2f}"  # noqa: E731
        rows.append([sample.model, str(sample.pixels), f"{sample.images}, {sample.steps} steps", records.cell(sample.id, show)])
    return table(["model", "pixels", "images", "images/s"], rows)


def goals(records: Records, plan: plans.Plan) -> str:
    """What the numbers say of the claims that the project aims at."""
    by = {}
    for step in (*plan.steps, *plan.torch_steps):
        by.setdefault((step.side, step.model, step.pixels), step.id)

    def seconds(side, model, pixels):
        return records.median(by.get((side, model, pixels), ""))

    xl = records.get(by.get(("ours", "DiT-XL/2", 256), ""))
    rows = [["DiT-XL/2, 256 px: share of the bfloat16 peak", "50 %", f"{xl['mfu']:.0%}" if xl else MISSING]]
    for model in ("DiT-XL/2", "DiT-S/2"):
        both = seconds("dit-compile", model, 256), seconds("ours", model, 256)
        rows.append([f"{model}, 256 px: speed over the published code under torch.compile", "1.0x", ratio(*both)])
    for dig, dit, pixels, goal in (("DiG-S/2", "DiT-S/2", 1792, "2.5x"), ("DiG-XL/2", "DiT-XL/2", 2048, "1.8x")):
        both = seconds("ours", dit, pixels), seconds("ours", dig, pixels)
        rows.append([f"{dig}, {pixels} px: speed over {dit} with flash attention", goal, ratio(*both)])
    ours = {(m.batch, m.tokens, m.heads): m.id for m in plan.mixers if m.side == "gla"}
    for mixer in (m for m in plan.torch_mixers if m.side == "fla" and m.tokens == 16384):
        mine = ours.get((mixer.batch, mixer.tokens, mixer.heads), "")
        for which in ("forward", "backward"):
            both = records.median(f"{mixer.id}/{which}"), records.median(f"{mine}/{which}")
            rows.append([f"GLA {which}, {mixer.heads} heads, 16,384 tokens: speed over fla's kernel", "1.0x", ratio(*both)])
    return table(["goal", "wanted", "measured"], rows)


def predictions(records: Records, model: dict[str, Any] | None) -> str:
    """The static model's step beside the measured one."""
    rows = []
    for name, found in (model or {"variants": {}})["variants"].items():
        if name.startswith("before"):
            continue  # of code that is gone
        spec, pixels, batch, *rest = found["variant"].split(":")
        pairs = (setting.split("=") for setting in ",".join(rest).split(",") if setting)
        settings = tuple(sorted((key, int(value) if value.isdigit() else value) for key, value in pairs))
        step = plans.Step("ours", spec, int(pixels), int(batch), settings)
        measured = records.median(step.id)
        cells = [name, found["variant"], f"{found['total']['h100_ms']:.1f}", f"{found['total']['h200_ms']:.1f}"]
        rows.append([*cells, f"{1e3 * measured:.1f}" if measured else MISSING])
    return table(["", "step", "model, H100, ms", "model, H200, ms", "measured, ms"], rows) if rows else f"Predictions: {MISSING}."


def profiles(records: Records) -> str:
    shown = []
    for record in records.kind("profile"):
        if record.get("error"):
            continue
        busy = record["gpu_busy_us"] / max(1e-9, record["span_us"])
        shown.append(f"{record['id']}: {record['launches']} launches in {record['steps']} steps; the GPU was {busy:.0%} busy.\n")
        rows = [[f"`{row['kernel'][:60]}`", str(row["calls"]), f"{row['us'] / 1e3:.2f}"] for row in record["top"][:20]]
        shown.append(table(["kernel", "calls", "ms"], rows))
    return "\n".join(shown) or f"Trace of a step: {MISSING}."


def draw(records: Records, plan: plans.Plan, path: Path) -> bool:
    """Milliseconds of the mixers against tokens; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    drawn = False
    for axis, which in zip(axes, ("forward", "backward"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for mixer in (*plan.mixers, *plan.torch_mixers):
            if seconds := records.median(f"{mixer.id}/{which}"):
                lines.setdefault(f"{mixer.side}, {mixer.heads} heads", []).append((mixer.tokens, 1e3 * seconds))
        for name, points in lines.items():
            axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=name)
            drawn = True
        axis.set_title("forward" if which == "forward" else "forward and backward")
        axis.set_xlabel("tokens of an image; 65,536 in a batch")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
    if drawn:
        axes[0].legend()
        figure.savefig(path, dpi=90)
    plt.close(figure)
    return drawn


def page(records: Records, plan: plans.Plan, model: dict[str, Any] | None, figure: str | None) -> str:
    parts = ["# Measured on a GPU", machines(records), "## Values", values(records), "## Goals", goals(records, plan)]
    parts += ["## Training steps", steps(records, plan), "## Mixers", mixers(records, plan)]
    parts += [f"![Milliseconds of the mixers against tokens]({figure})"] if figure else []
    parts += ["## Sampling", samples(records, plan), "## The static model beside it", predictions(records, model)]
    return "\n\n".join([*parts, "## Trace", profiles(records)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", help="results.jsonl of visits, the oldest first")
    parser.add_argument("--model", type=Path, help="JSON of benchmarks.gpu.step_model")
    parser.add_argument("--out", type=Path, required=True, help="OUT.md and, if there is anything to draw, OUT.png")
    parser.add_argument("--rehearsal", action="store_true", help="the records are of a rehearsal")
    args = parser.parse_args()
    plan = plans.rehearsal() if args.rehearsal else plans.full()
    records = Records(read(args.records))
    figure = args.out.with_suffix(".png")
    drawn = draw(records, plan, figure)
    model = json.loads(args.model.read_text()) if args.model else None
    args.out.with_suffix(".md").write_text(page(records, plan, model, figure.name if drawn else None))
    print(f"{args.out.with_suffix('.md')}: {len(records.all)} records")


if __name__ == "__main__":
    main()
