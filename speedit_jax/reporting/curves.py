"""curves.png: the logged metrics of a run against the step."""

import json
from pathlib import Path

import numpy as np

from speedit_jax.storage import replacing

SHOWN = ("loss", "mse", "heldout_mse", "vb", "grad_norm", "learning_rate", "time_images_per_second")


def read_metrics(workdir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (steps [n], values [n])} of WORKDIR/metrics.jsonl, without lines that a kill cut short; null is NaN."""
    path = workdir / "metrics.jsonl"
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        for name, value in record.items():
            if value is None or isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(np.nan if value is None else value)
    return {name: (np.array(steps), np.array(values, float)) for name, (steps, values) in found.items()}


def write_curves(workdir: Path) -> Path | None:
    """Draws WORKDIR/metrics.jsonl to WORKDIR/curves.png; None where nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = read_metrics(workdir)
    names = [name for name in SHOWN if name in metrics]
    names += sorted(name for name in metrics if name.startswith("eval_") and not name.endswith("_std"))
    if not names:
        return None
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(11, 5.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        values = metrics[name][1]
        alone = np.isfinite(values).sum() == 1  # through one value there is no line
        axis.plot(*metrics[name], linewidth=0.8, marker="." if alone or name.startswith("eval_") else "")
        axis.set_title(name.removeprefix("time_").replace("_", " "))
        axis.set_xlabel("step")
        # Not of what falls below zero, as the loss does under regularizer.dispersive: nothing would be drawn from there on.
        if name in ("loss", "mse", "heldout_mse", "grad_norm") and (values[np.isfinite(values)] > 0).all():
            axis.set_yscale("log")
    path = workdir / "curves.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)
    return path
