"""From raw numbers to speed-ups: pure functions of what the runs wrote. docs/results/speedup_protocol.md defines the terms."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from benchmarks.speedup.plan import Piece, pieces
from speedit_jax.errors import UserError

SHARES = (0.5, 0.75, 1.0)  # of the baseline's steps, whose quality is the target
RESAMPLES, INTERVAL = 2000, (5, 95)
# Of a scale, what all runs of a comparison must share.
_SAME = ("width", "depth", "patch", "batch_size", "num_steps", "learning_rate", "evaluate_every")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Fréchet distances of one strategy's ema: [seeds, evaluations] at `steps` [evaluations]."""

    steps: np.ndarray
    distances: np.ndarray

    @property
    def seeds(self) -> int:
        return len(self.distances)


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """The baseline's steps over a strategy's, to a target.

    Attributes:
      ratio: where `reached` is False the true one is less than this.
      low, high: percentiles INTERVAL over resampled seeds.
    """

    ratio: float
    low: float
    high: float
    reached: bool


def read(directory: Path, *scales: str) -> dict[Piece, dict]:
    """The raw numbers of the pieces of these scales that were begun.

    Raises:
      UserError: they were not all measured in the same way.
    """
    found, judges = {}, {}
    for piece in (piece for scale in scales for piece in pieces(scale)):
        path = directory / piece.scale / f"{piece.name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        how = {"judge": record["judge"]["weights"], "evaluation": record["evaluation"]}
        how |= {name: record["scale"][name] for name in _SAME}
        if judges.setdefault(piece.set, how) != how:
            raise UserError(f"{path} was not measured as the others of its set were; move it away and make the run again")
        found[piece] = record
    return found


def distance(row: dict) -> float:
    """Of an evaluation; a run that broke down is infinitely far away."""
    value = row["weights"]["ema"]["fd"]
    return value if math.isfinite(value) and math.isfinite(row["loss"]) else math.inf


def curve(records: dict[Piece, dict], image_set: str, strategy: str, seeds: list[int] | None = None) -> Curve | None:
    """The complete runs of a strategy; None where there is none.

    Args:
      seeds: only these.
    """
    chosen = [
        record["rows"]
        for piece, record in records.items()
        if (piece.set, piece.strategy) == (image_set, strategy) and record["complete"] and (seeds is None or piece.seed in seeds)
    ]
    if not chosen:
        return None
    steps = np.array([row["step"] for row in chosen[0]])
    return Curve(steps, np.array([[distance(row) for row in rows] for rows in chosen]))


def seeds_of(records: dict[Piece, dict], image_set: str, strategy: str) -> list[int]:
    """Of its complete runs."""
    return [p.seed for p, r in records.items() if (p.set, p.strategy) == (image_set, strategy) and r["complete"]]


def first_reached(steps: np.ndarray, distances: np.ndarray, target: float) -> float | None:
    """The first step at which a curve is at or below the target, between two points by the logarithm; None where it is never."""
    below = np.flatnonzero(distances <= target)
    if not below.size:
        return None
    i = below[0]
    if i == 0 or not np.isfinite(distances[i - 1]):
        return float(steps[i])
    before, after = np.log(distances[i - 1]), np.log(max(distances[i], 1e-12))
    return float(steps[i - 1] + (steps[i] - steps[i - 1]) * (before - np.log(target)) / (before - after))


def at(steps: np.ndarray, distances: np.ndarray, step: float) -> float:
    """A curve's distance at a step, between two points by the logarithm."""
    return float(np.exp(np.interp(step, steps, np.log(distances))))


def _ratio(steps: np.ndarray, baseline: np.ndarray, other: np.ndarray, share: float) -> tuple[float, bool]:
    budget = steps[-1] * share
    target = at(steps, baseline, budget) * (1 + 1e-12)  # the logarithm rounds
    reached = first_reached(steps, other, target)
    return (share, False) if reached is None else (budget / reached, True)


def speed_up(baseline: Curve, other: Curve, share: float, seed: int = 0) -> SpeedUp:
    """Of `other` over `baseline`, whose rows are of the same seeds, to the baseline's quality at `share` of its steps.

    Raises:
      ValueError: the curves are not of as many seeds, or of other steps.
    """
    if baseline.seeds != other.seeds or not np.array_equal(baseline.steps, other.steps):
        raise ValueError("the curves must be of the same seeds and steps")
    ratio, reached = _ratio(baseline.steps, baseline.distances.mean(0), other.distances.mean(0), share)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, baseline.seeds, baseline.seeds) for _ in range(RESAMPLES)]
    ratios = [_ratio(baseline.steps, baseline.distances[i].mean(0), other.distances[i].mean(0), share)[0] for i in drawn]
    low, high = np.percentile(ratios, INTERVAL)
    return SpeedUp(ratio, float(low), float(high), reached)


def over_plain(plain: Curve, method: Curve, share: float, second: tuple[Curve, float] | None = None) -> list[float]:
    """A method's distance over that of the run without it at as many FLOPs, of each seed.

    Args:
      share: FLOPs of a step of the method, of a plain one.
      second: the method's second phase and the share of its steps. Then both phases count whole.
    """
    steps = plain.steps
    if second:
        last, of_last = second
        budget = steps[-1] * share + last.steps[-1] * of_last  # in plain steps
        return [ours[-1] / at(steps, theirs, budget) for ours, theirs in zip(last.distances, plain.distances, strict=True)]
    budget = steps[-1] * min(1, share)
    pairs = zip(method.distances, plain.distances, strict=True)
    return [at(steps, ours, budget / share) / at(steps, theirs, budget) for ours, theirs in pairs]


def missing(records: dict[Piece, dict], scale: str, image_set: str) -> list[Piece]:
    """The pieces of a set that are not complete."""
    return [p for p in pieces(scale) if p.set == image_set and not records.get(p, {}).get("complete")]


def planned_seeds(scale: str, image_set: str, strategy: str) -> int:
    return sum((p.set, p.strategy) == (image_set, strategy) for p in pieces(scale))
