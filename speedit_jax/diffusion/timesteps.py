r"""Which timesteps to train on, and with what weight: SpeeDiT and the strategies it is compared with.

A strategy is `init() -> s`, `sample(key, n, step, s) -> (t [n], weight [n])`, `update(s, t, loss) -> s`; s lives in the
train state. The weight multiplies the mse of the noise prediction, never the variational term. n is the whole optimizer
batch, before accumulation and sharding: the dual draw below depends on it.

With sigma_t = sqrt(1 - abar_t), SNR_t = abar_t / (1 - abar_t) and t = 0..T-1:

Sampling densities
  (1)  uniform:  p_t = 1 / T
  (2)  speedit:  p_t ~ tanh(1e6 (g_t - 1e-4)) + 1.5,  g = numpy.gradient(sigma): SpeeDiT's first release
       M = 1 + min{t : g_t < 1e-4}: the "meaningful" steps 0..M-1 are drawn five times as often as the others
  (3)  speed:    p_t ~ k for t < tau T / 1000, else 1: SpeeD, CVPR 2025, arXiv 2405.17403
  (8)  lognormal: ln s_t ~ N(m, d^2), s = 1 / sqrt(SNR) mapped to the nearest ln s_t: EDM, arXiv 2206.00364
Weights
  (4)  none:     w_t = 1
  (5)  p2:       w_t = 1 / (1 + SNR_t) = 1 - abar_t: P2 with k = gamma = 1, arXiv 2204.00227
  (6)  change_aware:  w_t = (1 - lambda) + (2 lambda - 1) (v_t - min v) / (max v - min v),  v = numpy.gradient(1 - abar): SpeeD
  (9)  min_snr:  w_t = min(SNR_t, gamma) / SNR_t: arXiv 2303.09556, for noise prediction
Dual draw
  (7)  Of n timesteps n//2 + 1 are drawn from p; the rest are duals of the first of these, dual(t) = P - t for t < P and
       t - P otherwise, an antithetic pairing about the pivot P (M for SpeeDiT).

Presets: `uniform` = (1)(4), `p2` = (1)(5), `speedit` = (2)(5)(7), `speed_cvpr25` = (3)(6),
`min_snr` = (1)(9), `lognormal` = (8)(4).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.schedules import Schedule
from speedit_jax.errors import UserError

_GRADIENT_THRESHOLD = 1e-4


@dataclasses.dataclass(frozen=True)
class TableStrategy:
    """A strategy given by a fixed density and fixed weights.

    Attributes:
      name: what the log calls it.
      density: [T] float64, sums to 1: the density the independent draws come from.
      weights: [T] float64.
      pivot: P of the dual draw (7), or None for independent draws only.
    """

    name: str
    density: np.ndarray
    weights: np.ndarray
    pivot: int | None = None

    def init(self) -> Any:
        """Nothing to remember: the empty pytree."""
        return ()

    def sample(self, key: jax.Array, n: int, step: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        """n timesteps and their weights, both [n]."""
        del step, state
        num_steps = len(self.density)
        drawn = n if self.pivot is None else n // 2 + 1
        t = jax.random.choice(key, num_steps, (drawn,), p=jnp.asarray(self.density, jnp.float32))
        if self.pivot is not None:
            t = jnp.concatenate([t, jnp.asarray(self.dual)[t]])[:n]
        return t, jnp.asarray(self.weights, jnp.float32)[t]

    def update(self, state: Any, t: jax.Array, loss: jax.Array) -> Any:
        del t, loss
        return state

    @property
    def dual(self) -> np.ndarray:
        """dual(t) of (7) for every t. [T] int"""
        t = np.arange(len(self.density))
        dual = np.where(t < self.pivot, self.pivot - t, t - self.pivot)
        # The published code steps out of the table when the pivot is T; the nearest step stands in.
        return dual.clip(max=len(self.density) - 1)

    def marginal(self, n: int) -> np.ndarray:
        """The exact density of a timestep picked at random from `sample`'s n. [T] float64"""
        if self.pivot is None:
            return self.density
        drawn = min(n, n // 2 + 1)
        pushed = np.bincount(self.dual, weights=self.density, minlength=len(self.density))
        return (drawn * self.density + (n - drawn) * pushed) / n

    def describe(self, n: int) -> str:
        """One line for the log: what is drawn, with the numbers."""
        marginal = self.marginal(n)
        parts = [
            f"{self.name}: T={len(self.density)}",
            f"E[t]={marginal @ np.arange(len(marginal)):.1f}",
            f"E[weight]={marginal @ self.weights:.4f}",
            f"density max/min={marginal.max() / marginal.min():.2f}",
        ]
        if self.pivot is not None:
            parts.append(f"dual draw about {self.pivot}, {marginal[self.pivot :].sum():.1%} of draws at t >= {self.pivot}")
        return ", ".join(parts)


def meaningful_steps(schedule: Schedule) -> int:
    """M of (2).

    Raises:
      UserError: no gradient is below the threshold. The published code silently takes M = 1 there, which turns its
        density uniform and its dual into a shift by one.
    """
    below = np.gradient(schedule.sigmas) < _GRADIENT_THRESHOLD
    if not below.any():
        raise UserError(
            f"SpeeDiT's rule finds no step of schedule {schedule.name!r} with {schedule.num_steps} steps where the noise"
            f" level changes by less than {_GRADIENT_THRESHOLD:g} a step; use timesteps.strategy=speed_cvpr25 or a longer"
            " schedule"
        )
    return int(np.argmax(below)) + 1


def _speedit_density(schedule: Schedule) -> np.ndarray:
    meaningful_steps(schedule)  # the error for schedules on which the rule means nothing
    raw = np.tanh(1e6 * (np.gradient(schedule.sigmas) - _GRADIENT_THRESHOLD)) + 1.5
    return raw / raw.sum()


def _speed_density(schedule: Schedule, k: float, tau: float) -> np.ndarray:
    raw = np.where(np.arange(schedule.num_steps) < _speed_boundary(schedule, tau), float(k), 1.0)
    return raw / raw.sum()


def _speed_boundary(schedule: Schedule, tau: float) -> int:
    return round(tau * schedule.num_steps / 1000)


def _change_aware_weights(schedule: Schedule, lam: float) -> np.ndarray:
    v = np.gradient(1.0 - schedule.alphas_cumprod)
    return (1 - lam) + (2 * lam - 1) * (v - v.min()) / (v.max() - v.min())


def _lognormal_density(schedule: Schedule, mean: float, std: float) -> np.ndarray:
    log_sigma = -0.5 * np.log(_snr(schedule))
    borders = (log_sigma[1:] + log_sigma[:-1]) / 2
    below = np.array([0.5 * (1 + math.erf((x - mean) / (std * math.sqrt(2)))) for x in borders])
    return np.diff(below, prepend=0.0, append=1.0)


def _min_snr_weights(schedule: Schedule, gamma: float) -> np.ndarray:
    return np.minimum(1.0, gamma / _snr(schedule))


def _snr(schedule: Schedule) -> np.ndarray:
    return schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)


# strategy -> its (sampling, weighting, dual)
PRESETS = {
    "uniform": ("uniform", "none", False),
    "p2": ("uniform", "p2", False),
    "speedit": ("speedit", "p2", True),
    "speed_cvpr25": ("speed", "change_aware", False),
    "min_snr": ("uniform", "min_snr", False),
    "lognormal": ("lognormal", "none", False),
}
SAMPLINGS = ("uniform", "speedit", "speed", "lognormal")
WEIGHTINGS = ("none", "p2", "change_aware", "min_snr")


def _choose(kind: str, name: str, choices) -> str:
    if name not in choices:
        raise UserError(f"unknown timesteps.{kind} {name!r}; choose one of {', '.join(choices)}")
    return name


def make_strategy(
    schedule: Schedule,
    strategy: str,
    *,
    sampling: str | None = None,
    weighting: str | None = None,
    dual: bool | None = None,
    k: float = 5.0,
    tau: float = 700.0,
    lam: float = 0.6,
    gamma: float = 5.0,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
) -> TableStrategy:
    """The strategy called `strategy`, with any of its three parts replaced.

    Args:
      schedule: of training.
      strategy: one of PRESETS.
      sampling, weighting, dual: None keeps the preset's part.
      k, tau: of density (3): how many times more often the first tau steps (of 1000; scaled with T) are drawn; k >= 1.
      lam: lambda of weight (6), in [0.5, 1]; 0.5 weights all steps alike.
      gamma: of weight (9), positive.
      log_sigma_mean, log_sigma_std: m and d of density (8).

    Raises:
      UserError: an unknown name or a number out of range.
    """
    preset = PRESETS[_choose("strategy", strategy, PRESETS)]
    sampling = _choose("sampling", preset[0] if sampling is None else sampling, SAMPLINGS)
    weighting = _choose("weighting", preset[1] if weighting is None else weighting, WEIGHTINGS)
    dual = preset[2] if dual is None else dual
    if not 1 <= k < math.inf:
        raise UserError(f"timesteps.k={k}: must be finite and at least 1")
    if not 0 < tau < 1000:
        raise UserError(f"timesteps.tau={tau}: must lie between 0 and 1000, whatever the number of steps")
    if not 0.5 <= lam <= 1:
        raise UserError(f"timesteps.lam={lam}: must lie in [0.5, 1]")
    for name, value in (("gamma", gamma), ("log_sigma_std", log_sigma_std)):
        if not 0 < value < math.inf:
            raise UserError(f"timesteps.{name}={value}: must be finite and positive")
    if not math.isfinite(log_sigma_mean):
        raise UserError(f"timesteps.log_sigma_mean={log_sigma_mean}: must be finite")

    num_steps = schedule.num_steps
    density = {
        "uniform": lambda: np.full(num_steps, 1 / num_steps),
        "speedit": lambda: _speedit_density(schedule),
        "speed": lambda: _speed_density(schedule, k, tau),
        "lognormal": lambda: _lognormal_density(schedule, log_sigma_mean, log_sigma_std),
    }[sampling]()
    weights = {
        "none": lambda: np.ones(num_steps),
        "p2": lambda: 1.0 - schedule.alphas_cumprod,
        "change_aware": lambda: _change_aware_weights(schedule, lam),
        "min_snr": lambda: _min_snr_weights(schedule, gamma),
    }[weighting]()
    pivot = None
    if dual:
        # The paper's density brings its own boundary: pairing it about M instead would undo most of its suppression.
        pivot = _speed_boundary(schedule, tau) if sampling == "speed" else meaningful_steps(schedule)
    name = strategy
    if (sampling, weighting, dual) != preset:
        name = f"{strategy} with sampling={sampling}, weighting={weighting}, dual={dual}"
    return TableStrategy(name, density, weights, pivot)
