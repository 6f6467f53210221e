"""What a run's directory holds of numbers and pictures that belong to one of its checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.conversion.public import place
from speedit_jax.reporting.curves import read_metrics
from speedit_jax.training.run import Run

_OF_PIXELS = "of the pixels, not of Inception's features: it compares only with distances of pixels"
_MEANINGS = {
    "fid": {"inception": "Fréchet Inception distance; lower is better", "pixels": f"Fréchet distance {_OF_PIXELS}"},
    "sfid": {"inception": "Fréchet distance of Inception's spatial features; lower is better"},
    "is": {"inception": "Inception Score; higher is better"},
    "is_std": {"inception": "standard deviation of the Inception Score over its splits"},
    "kid": {"inception": "kernel Inception distance; lower is better", "pixels": f"kernel distance {_OF_PIXELS}"},
    "kid_std": {"": "standard deviation of the kernel distance over its subsets"},
    "precision": {"": "share of the samples in the manifold of the reference, by {}; higher is better"},
    "recall": {"": "share of the reference in the manifold of the samples, by {}; higher is better"},
    "match": {"": "share of the samples whose nearest reference picture, by {}, has their prompt as a caption; higher is better"},
    "match_error": {"": "standard error of match"},
    "match_chance": {"": "match of pictures that have nothing to do with their prompts"},
    "clip": {"": "CLIP score, 100 times the cosine of a sample and its prompt; higher is better"},
    "clip_error": {"": "standard error of the CLIP score"},
}


@dataclasses.dataclass(frozen=True)
class Number:
    """A measured value.

    Attributes:
      step: of the weights that it was measured on.
      meaning: what it is, for people.
      of: the samples or images that it was measured on.
    """

    name: str
    value: float
    step: int
    meaning: str
    of: str

    def record(self) -> dict[str, Any]:
        """JSON."""
        return dataclasses.asdict(self)


def numbers(run: Run, weights: str) -> list[Number]:
    """What was measured of these weights: during training at this step or the last time before, and by commands at this step."""
    found = [*_during_training(run, weights)]
    paths = [*run.workdir.glob("*.json"), *run.workdir.glob("*/*.json")]
    for record in map(_read, sorted(paths)):
        if isinstance(record.get("metrics"), dict):
            found += _evaluated(run, weights, record)
        elif "total_bpd" in record and (record.get("checkpoint_step"), record.get("weights")) == (run.step, weights):
            found.append(_bound(run, record))
    return found


def newest_grid(run: Run) -> Path | None:
    """The newest grid of samples that training drew up to the checkpoint; None without any."""
    paths = {path.stem.removeprefix("step_"): path for path in (run.workdir / "samples").glob("step_*.png")}
    steps = [step for step in paths if step.isdecimal() and int(step) <= run.step]
    return paths[max(steps, key=int)] if steps else None


def _during_training(run: Run, weights: str) -> list[Number]:
    config, found = run.config, []
    section, data = config.evaluation, config.data
    reference = f"{place(section.reference or data.source)} ({section.split if section.reference else data.split})"
    drawn = f"{section.num_images:,} samples drawn as training draws them, against {reference}"
    split = section.loss_split or ("train" if section.loss_source else data.split)
    source = f"{place(section.loss_source or data.source)} ({split})"
    kinds = {"ema": ("eval_", "heldout_"), "raw": ("raw_heldout_",)}.get(weights, ())
    for name, (steps, values) in read_metrics(run.workdir).items():
        kind = next((kind for kind in kinds if name.startswith(kind)), None)
        here = np.flatnonzero(steps <= run.step)
        if kind is None or not len(here) or not np.isfinite(values[here[-1]]):
            continue
        step, value, metric = int(steps[here[-1]]), float(values[here[-1]]), name.removeprefix(kind)
        if kind == "eval_":
            features = section.features
            found.append(Number(_name(metric, features), value, step, _meaning(metric, features), drawn))
        elif metric == "mse":
            meaning = "mean squared error of the prediction, without the weights of the loss; lower is better"
            found.append(Number("held-out mse", value, step, meaning, f"{section.loss_images:,} examples of {source}"))
    return found


def _evaluated(run: Run, weights: str, record: dict[str, Any]) -> list[Number]:
    """Of a file that evaluate wrote, where its images were sampled from these weights into this directory."""
    images, reference = record.get("images") or {}, record.get("reference") or {}
    drawn = storage.path(str(images.get("from")).removeprefix("folder:"))
    if drawn.exists() and storage.resolved(drawn).parent != storage.resolved(run.workdir):
        return []  # of another run
    # Earlier versions of evaluate did not say; other images may have the name by now.
    sampled = images.get("sampled") or _read(run.workdir / drawn.with_suffix(".json").name)
    if (sampled.get("checkpoint_step"), sampled.get("weights")) != (run.step, weights):
        return []
    of = (
        f"{images.get('n'):,} samples ({sampled.get('sampler')}, {sampled.get('num_steps')} steps,"
        f" guidance {sampled.get('guidance_scale')})"
    )
    if reference.get("from"):
        count = f"{reference['n']:,}" if reference.get("n") else "an unknown number"
        of += f", against {count} of {place(reference['from'])}"
    features = str(record.get("features"))
    return [
        Number(_name(name, features), value, run.step, _meaning(name, features), of) for name, value in record["metrics"].items()
    ]


def _bound(run: Run, record: dict[str, Any]) -> Number:
    images = record.get("images") or {}
    of = f"{images.get('n'):,} images of {place(str(images.get('from')))} ({images.get('split')})"
    return Number("bits per dimension", record["total_bpd"], run.step, "at most, by the variational bound; lower is better", of)


def _name(metric: str, features: str) -> str:
    of_features = features != "inception" and not metric.startswith("clip")
    return f"{metric} ({features})" if of_features else metric


def _meaning(metric: str, features: str) -> str:
    meanings, of = _MEANINGS.get(metric, {}), {"inception": "Inception's features"}.get(features, features)
    return meanings.get(features) or meanings.get("", f"{metric}, by {{}}").format(of)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
