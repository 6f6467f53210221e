"""How many steps does each sampler need, and what does guidance change? On a digits run, judged as in digits_quality.

  python -m speedit_jax.train --config=configs/digits.py --config.checkpoint.keep_every=250 --workdir=runs/digits
  python -m benchmarks.sampling_steps --workdir=runs/digits --guide_step=500 --out=docs/results/sampling

Each of --num_images samples, as many of every class, of one sampling seed: DDPM with 250 steps, every sampler at every number of
steps, then every guidance with 20 steps of DPM-Solver++. "error" is the root mean square over pixels in [-1, 1] of the difference
from the images that the probability flow makes of the same noise, taken to be those of 100 steps of DPM-Solver++; pixels are
multiples of 1/127.5. Intervals are 95 % bootstraps over samples and, for recall, over held-out images by class, of one training
and one noise.
Writes OUT.json after every setting, leaving out what it already holds, and OUT.png.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.digits_quality import judge, sample

SAMPLERS = {
    "DDPM": ["--sampler=ddpm", "--spacing=even"],
    "DDIM": ["--sampler=ddim", "--eta=0", "--spacing=even"],
    "2M, even in t": ["--sampler=dpm++", "--eta=0", "--spacing=even"],
    "2M": ["--sampler=dpm++", "--eta=0", "--spacing=logsnr"],
    "2M SDE": ["--sampler=dpm++", "--eta=1", "--spacing=logsnr"],
}
FAST, SLOW, LIMIT = ("2M", 20), ("DDPM", 250), ("2M", 100)
IN_FLOW = ("DDIM", "2M, even in t", "2M")  # the samplers whose limit is the probability flow
GUIDANCE = {
    "none": ["--guidance_scale=1"],
    "1.25": ["--guidance_scale=1.25"],
    "1.5": ["--guidance_scale=1.5"],
    "1.5, linear": ["--guidance_scale=1.5", "--guidance_schedule=linear"],
    "1.5, cosine": ["--guidance_scale=1.5", "--guidance_schedule=cosine"],
    "1.5 in 0..0.5": ["--guidance_scale=1.5", "--guidance_high=0.5"],
    "1.5 in 0.2..0.8": ["--guidance_scale=1.5", "--guidance_low=0.2", "--guidance_high=0.8"],
    "1.5 in 0.5..1": ["--guidance_scale=1.5", "--guidance_low=0.5"],
}
METRICS = {
    "recognised": "share of samples recognised",
    "distance": "distance to the nearest training image\n(1: as held-out images)",
    "recall": "recall, mean over classes",
    "error": "RMS distance from the probability flow",
}
Statistic = Callable[[dict, np.random.Generator | None], float]


def resampled(values: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    return values if rng is None else values[rng.integers(0, len(values), len(values))]


# Of judged samples; with a generator, of a bootstrap sample of them.
STATISTICS: dict[str, Statistic] = {
    "recognised": lambda judged, rng: np.mean(resampled(judged["recognised"], rng)),
    "distance": lambda judged, rng: np.median(resampled(judged["distance"], rng)),
    "recall": lambda judged, rng: np.mean([resampled(c, rng).mean() for c in judged["covered"]]),
}


def interval(draws: list[float]) -> list[float]:
    return np.percentile(draws, [2.5, 97.5]).tolist()


def statistics(judged: dict) -> dict:
    """{metric: {"value", "interval"}}."""
    return {
        name: {
            "value": float(statistic(judged, None)),
            "interval": interval([statistic(judged, np.random.default_rng(i)) for i in range(1000)]),
        }
        for name, statistic in STATISTICS.items()
    }


def differences(judged: dict, reference: dict) -> dict:
    """`statistics` of `judged` minus those of `reference`; for recall the same held-out images are drawn on both sides."""

    def difference(name: str, i: int | None) -> float:
        # Samples of two samplers are independent; held-out images are the same ones.
        mine, theirs = (None, None) if i is None else ([i, 0], [i, 0] if name == "recall" else [i, 1])
        rngs = (seed and np.random.default_rng(seed) for seed in (mine, theirs))
        return float(np.subtract(*(STATISTICS[name](j, rng) for j, rng in zip((judged, reference), rngs, strict=True))))

    return {
        name: {"value": difference(name, None), "interval": interval([difference(name, i) for i in range(1000)])}
        for name in STATISTICS
    }


class Runs:
    """Samples of one training run, each setting drawn once."""

    def __init__(self, workdir: str, num_images: int, path: Path):
        self._workdir, self._num_images, self._path = workdir, num_images, path
        self.record = json.loads(path.read_text()) if path.exists() else {}
        self._drawn = {}

    def images(self, flags: list[str]) -> tuple[np.ndarray, np.ndarray, dict]:
        key = " ".join(flags)
        if key not in self._drawn:
            with tempfile.TemporaryDirectory() as scratch:
                self._drawn[key] = sample(self._workdir, Path(scratch) / "samples", [*flags, f"--num_images={self._num_images}"])
        return self._drawn[key]

    def judged(self, flags: list[str]) -> dict:
        images, labels, _ = self.images(flags)
        return judge(images, labels)

    def add(self, section: str, name: str, entry: Callable[[], dict]) -> None:
        """record[section][name] = entry(), unless it is there."""
        entries = self.record.setdefault(section, {})
        if name not in entries:
            entries[name] = entry()
            self._path.write_text(json.dumps(self.record, indent=1) + "\n")


def flags_of(sampler: str, num_steps: int) -> list[str]:
    return [*SAMPLERS[sampler], f"--num_steps={num_steps}"]


def measure(runs: Runs, sampler: str, num_steps: int) -> dict:
    flags = flags_of(sampler, num_steps)
    entry = {"sampler": sampler, "num_steps": num_steps} | statistics(runs.judged(flags))
    if sampler in IN_FLOW and (sampler, num_steps) != LIMIT:
        difference = runs.images(flags)[0] - runs.images(flags_of(*LIMIT))[0]
        entry["error"] = {"value": float(np.sqrt(np.mean(difference**2)))}
    return entry


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, METRICS.items(), strict=True):
        for i, sampler in enumerate(SAMPLERS):
            shown = sorted((row for row in rows if row["sampler"] == sampler and metric in row), key=lambda row: row["num_steps"])
            if not shown:
                continue
            steps, values = ([row["num_steps"] for row in shown], np.array([row[metric]["value"] for row in shown]))
            if "interval" in shown[0][metric]:
                low, high = np.array([row[metric]["interval"] for row in shown]).T
                bars = {"yerr": np.maximum(0, [values - low, high - values]), "capsize": 2}
            else:
                bars = {}
            label = sampler.replace("2M", "DPM-Solver++(2M)")
            axis.errorbar(steps, values, marker="o", markersize=3, color=f"C{i}", label=label, **bars)
        axis.set_xscale("log")
        ticks = sorted({row["num_steps"] for row in rows})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        if metric == "error":
            axis.set_yscale("log")
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def show(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        numbers = (f"{m} {v['value']:.3f} {[round(x, 3) for x in v.get('interval', [])]}" for m in METRICS if (v := row.get(m)))
        print(f"{name:<28}", *numbers, sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run of configs/digits.py")
    parser.add_argument("--guide_step", type=int, help="a checkpoint of that run for autoguidance")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[20, 10, 5])
    parser.add_argument("--num_images", type=int, default=1000, help="a multiple of 10")
    args = parser.parse_args()

    runs = Runs(args.workdir, args.num_images, args.out.with_suffix(".json"))
    settings = [LIMIT, SLOW, *((sampler, n) for n in args.num_steps for sampler in SAMPLERS)]
    for sampler, num_steps in tqdm(settings, "samplers"):
        runs.add("samplers", f"{sampler}, {num_steps}", lambda s=sampler, n=num_steps: measure(runs, s, n))
    fast = flags_of(*FAST)
    names = [f"{sampler}, {n}" for sampler, n in (FAST, SLOW)]
    runs.add("differences", " - ".join(names), lambda: differences(runs.judged(fast), runs.judged(flags_of(*SLOW))))
    guidance = dict(GUIDANCE)
    if args.guide_step is not None:
        guide = [f"--guide_workdir={args.workdir}", f"--guide_step={args.guide_step}"]
        for scale in ("1.25", "1.5", "2"):
            guidance[f"autoguidance {scale}, step {args.guide_step}"] = [f"--guidance_scale={scale}", *guide]
    for name, flags in tqdm(guidance.items(), "guidance"):
        runs.add("guidance", name, lambda flags=flags: statistics(runs.judged([*fast, *flags])))
    runs.add("settings", "fast", lambda: {k: v for k, v in runs.images(fast)[2].items() if k != "workdir"})
    draw(list(runs.record["samplers"].values()), args.out.with_suffix(".png"))
    for section in ("samplers", "differences", "guidance"):
        show(runs.record[section])


if __name__ == "__main__":
    main()
