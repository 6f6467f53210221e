"""Where strategies draw on the time of a flow.

python -m benchmarks.flow_densities --out=docs/results/flow_densities.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.flow_timesteps import make_flow_strategy
from speedit_jax.diffusion.schedules import make_schedule

STRATEGIES = ("uniform", "logit_normal", "lognormal", "speedit", "speed_cvpr25")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vp = make_schedule("linear", 1000)
    figure, axes = plt.subplots(1, len(PATHS), figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, path in zip(axes, PATHS, strict=True):
        flow = FlowMatching(path)
        times = 1 - (np.arange(flow.num_steps) + 0.5) / flow.num_steps
        for name in STRATEGIES:
            axis.plot(times, flow.num_steps * make_flow_strategy(flow, vp, 256, strategy=name).density, label=name)
        axis.set_title(f"{path}: density over the flow's time")
        axis.set_xlabel("s, from noise (0) to data (1)")
        axis.set_ylim(0, 6)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
