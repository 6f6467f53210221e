"""curves.png: the logged metrics of a run against the step."""

import json
from pathlib import Path

SHOWN = ("loss", "mse", "vb", "grad_norm", "learning_rate", "time_images_per_second")


def write_curves(workdir: Path) -> Path | None:
    """Draws WORKDIR/metrics.jsonl to WORKDIR/curves.png; None where nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in SHOWN if any(name in record for record in records)]
    if not names:
        return None
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(11, 5.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), linewidth=0.8)
        axis.set_title(name.removeprefix("time_").replace("_", " "))
        axis.set_xlabel("step")
        if name in ("loss", "mse", "grad_norm"):
            axis.set_yscale("log")
    path = workdir / "curves.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
