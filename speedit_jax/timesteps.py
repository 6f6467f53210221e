"""Plots how a config draws and weights timesteps; needs no data and builds no network.

  python -m speedit_jax.timesteps --config=digits [--config.KEY=VALUE ...] [--out=timesteps.png]

One picture of the density, the loss weight, their product and the schedule's log-SNR against t. Its numbers are in the JSON
beside it: t, log_snr, weight [T], and for each optimizer step shown (one, but for a curriculum) density and product [T], the
means of t and of the weight, and the share of the draws in each quarter of the schedule.
"""

import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from speedit_jax import cli, storage
from speedit_jax.diffusion.strategies import CurriculumStrategy
from speedit_jax.errors import UserError
from speedit_jax.training import assembly
from speedit_jax.training.check import check_numbers

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe or a config file, e.g. digits.", lock_config=True)
_OUT = flags.DEFINE_string("out", "timesteps.png", "Where to write: PATH.png and PATH.json.")


def numbers(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What is drawn, as JSON.

    Raises:
      UserError: the config's diffusion or timesteps are not possible.
    """
    check_numbers(config)
    diffusion = assembly.make_diffusion(config)
    strategy = assembly.make_strategy(config, diffusion)
    batch_size = config.training.batch_size
    t, abar = np.arange(diffusion.schedule.num_steps), diffusion.schedule.alphas_cumprod
    steps = (0, strategy.steps // 2, strategy.steps) if isinstance(strategy, CurriculumStrategy) else (0,)
    shown = []
    for step in steps:
        density = strategy.marginal(batch_size, step)
        shown.append(
            {
                "step": step,
                "mean_t": density @ t,
                "mean_weight": density @ strategy.weights,
                "quarters": np.bincount(4 * t // len(t), weights=density, minlength=4).tolist(),
                "density": density.tolist(),
                "product": (density * strategy.weights).tolist(),
            }
        )
    return {
        "description": strategy.describe(batch_size),
        "schedule": diffusion.schedule.name,
        "prediction": diffusion.prediction,
        "weighted": diffusion.weighted,
        "batch_size": batch_size,
        "t": t.tolist(),
        "log_snr": np.log(abar / (1 - abar)).tolist(),
        "weight": strategy.weights.tolist(),
        "shown": shown,
    }


def draw(path: Path, record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    t, shown = np.array(record["t"]), record["shown"]
    panels = {
        "density x T": [(entry["step"], len(t) * np.array(entry["density"])) for entry in shown],
        f"weight on {record['weighted']}": [(0, np.array(record["weight"]))],
        "density x weight x T": [(entry["step"], len(t) * np.array(entry["product"])) for entry in shown],
        f"log-SNR of {record['schedule']}": [(0, np.array(record["log_snr"]))],
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for step, values in lines:
            axis.plot(t, values, linewidth=1.2, label=f"step {step}")
        if len(lines) > 1:
            axis.legend()
        if axis is not axes.flat[-1]:
            everything = np.concatenate([values for _, values in lines])
            if everything.max() > 100 * np.median(everything):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("t")
    figure.suptitle(record["description"], fontsize=9, wrap=True)
    with storage.replacing(path) as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)


def timesteps() -> None:
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError("--config is missing or not a config file; for example --config=digits")
    out = storage.path(_OUT.value)
    if not out.name:
        raise UserError(f"--out={_OUT.value}: give a file, such as timesteps.png")
    out = out.with_suffix("") if out.suffix in (".png", ".json") else out
    record = numbers(_CONFIG.value)
    try:
        storage.make_directory(out.parent)
        draw(out.with_name(out.name + ".png"), record)
        storage.write_text(out.with_name(out.name + ".json"), json.dumps(record) + "\n")
    except OSError as e:
        raise UserError(f"cannot write to {out}: {storage.reason(e)}; choose another --out") from e
    print(record["description"])
    print(f"Density, weight, product and log-SNR in {out}.png, numbers in {out}.json")


if __name__ == "__main__":
    cli.run(timesteps)
