r"""Which timesteps to train on, and with what weight: SpeeDiT and the strategies it is compared with, as tables of a schedule.

How a density is drawn from is in `strategies.py`. With sigma_t = sqrt(1 - abar_t), SNR_t = abar_t / (1 - abar_t),
s_t = 1 / sqrt(SNR_t), EDM's noise level, and t = 0..T-1:

Sampling densities
  (1)  uniform:  p_t = 1 / T
  (2)  speedit:  p_t ~ tanh(1e6 (g_t - 1e-4)) + 1.5,  g = numpy.gradient(sigma): SpeeDiT's first release
       M = 1 + min{t : g_t < 1e-4}: the "meaningful" steps 0..M-1 are drawn five times as often as the others
  (3)  speed:    p_t ~ k for t < tau T / 1000, else 1: SpeeD, CVPR 2025, arXiv 2405.17403
  (8)  lognormal:  ln s ~ N(m, d^2), mapped to the nearest ln s_t: EDM, arXiv 2206.00364
  (10) logit_normal:  u = sigmoid(N(m, d^2)), time of the flow (1 - u) x_0 + u eps, mapped to the step of the nearest
       log-SNR: SD3, arXiv 2403.03206. The flow's noise level is u / (1 - u), so that this is (8) with other m and d
  (11) clts:     p_t = (1 - a) / T + a N(t; mu, sd^2) / sum, a from 0 at optimizer step 0 to 1: CLTS, arXiv 2404.07946
  (12) loss_second_moment:  p_t ~ sqrt(E[L_t^2]), the weights corrected for it: IDDPM, arXiv 2102.09672
  (15) laplace:  ln SNR ~ Laplace(m, b), mapped to the nearest ln SNR_t: arXiv 2407.03297
  (16) gradient_noise:  p_t ~ sqrt(tr Cov[grad L_t]), measured on the way, the weights corrected for it. Our own; ANTS,
       arXiv 2411.09998, learns its density from gradients, too
Weights
  (4)  none:     w_t = 1
  (5)  p2:       w_t = 1 / (1 + SNR_t) = 1 - abar_t: P2 with k = gamma = 1, arXiv 2204.00227
  (6)  change_aware:  w_t = (1 - lambda) + (2 lambda - 1) (v_t - min v) / (max v - min v),  v = numpy.gradient(1 - abar): SpeeD
  (9)  min_snr:  w_t = min(SNR_t, gamma) / SNR_t: arXiv 2303.09556
  (13) edm:      w_t = (s_t^2 + sd^2) / sd^2, sd the data's standard deviation: EDM; with (8), EDM's own objective
  (14) flow:     w_t = (1 + s_t)^2, which makes the mse that of the flow's velocity eps - x_0; with (10), SD3's own objective
Dual draw
  (7)  Of n timesteps n//2 + 1 are drawn from p; the rest are duals of the first of these, dual(t) = P - t for t < P and
       t - P otherwise, an antithetic pairing about the pivot P (M for SpeeDiT).

The weight multiplies the mse of the network's prediction, never the variational term. (4) and (6) are factors of that mse,
whatever is predicted: with x0 or v, `uniform` and `speed_cvpr25` minimise something else than with epsilon. The others weigh
an error by the SNR at which it is made. They are stated above for the mse of epsilon, and keep what is minimised the same for
the others, whose mse is 1 / SNR (x0) and 1 / abar (v) of it: w_t SNR_t for x0 and w_t abar_t for v. So p2, and speedit with it,
is 1 - abar, abar and abar (1 - abar) for epsilon, x0 and v; min_snr is min(SNR, gamma) over SNR, 1 and SNR + 1, as in its
paper; edm with sd = 1 is 1 for v. The velocity of a flow (`FlowMatching.worth`) has a mse of (1 + s_t)^2 that of epsilon on the
linear path, where (14) is 1, and of (pi / 2)^2 (1 + s_t^2) on the gvp path.

Presets: `uniform` = (1)(4), `p2` = (1)(5), `speedit` = (2)(5)(7), `speed_cvpr25` = (3)(6), `min_snr` = (1)(9),
`lognormal` = (8)(4), `logit_normal` = (10)(4), `clts` = (11)(4), `loss_second_moment` = (12)(4), `laplace` = (15)(4),
`gradient_noise` = (16)(4).
"""

import math

import numpy as np

from speedit_jax.diffusion.schedules import Schedule
from speedit_jax.diffusion.strategies import (
    CurriculumStrategy,
    GradientNoiseStrategy,
    LossSecondMomentStrategy,
    Strategy,
    TableStrategy,
)
from speedit_jax.errors import UserError

_GRADIENT_THRESHOLD = 1e-4


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
    boundary = round(tau * schedule.num_steps / 1000)
    if not 0 < boundary < schedule.num_steps:
        raise UserError(
            f"timesteps.tau={tau} is step {boundary} of {schedule.num_steps}, and so draws all of them alike; choose another tau,"
            " or timesteps.strategy=uniform"
        )
    return boundary


def _change_aware_weights(schedule: Schedule, lam: float) -> np.ndarray:
    if schedule.num_steps < 3:
        raise UserError(
            f"timesteps.weighting=change_aware: diffusion.num_steps={schedule.num_steps}, between which only one change lies; it"
            " needs 3 or more"
        )
    v = np.gradient(1.0 - schedule.alphas_cumprod)
    return (1 - lam) + (2 * lam - 1) * (v - v.min()) / (v.max() - v.min())


def _lognormal_density(schedule: Schedule, mean: float, std: float) -> np.ndarray:
    log_sigma = -0.5 * np.log(_snr(schedule))
    borders = ((log_sigma[1:] + log_sigma[:-1]) / 2 - mean) / std
    below, above = (np.array([math.erfc(side * z / math.sqrt(2)) / 2 for z in borders]) for side in (-1, 1))
    # Each tail from its own end: 1 - below would be zero long before it is.
    upper = np.append(False, borders > 0)
    return np.where(upper, -np.diff(above, prepend=1.0, append=0.0), np.diff(below, prepend=0.0, append=1.0))


def _laplace_density(schedule: Schedule, mean: float, scale: float) -> np.ndarray:
    noise = -np.log(_snr(schedule))  # increasing, and its law is the same about -mean
    z = ((noise[1:] + noise[:-1]) / 2 + mean) / scale
    tail = np.exp(-np.abs(z)) / 2  # beyond the border, on the side away from the middle
    below, above = np.where(z < 0, tail, 1 - tail), np.where(z < 0, 1 - tail, tail)
    upper = np.append(False, z > 0)
    return np.where(upper, -np.diff(above, prepend=1.0, append=0.0), np.diff(below, prepend=0.0, append=1.0))


def _gaussian_density(schedule: Schedule, mean: float, std: float) -> np.ndarray:
    z = (np.arange(schedule.num_steps) * 1000 / schedule.num_steps - mean) / std
    raw = np.exp(-0.5 * (z**2 - (z**2).min()))  # the least one is taken off so that not all become zero
    return raw / raw.sum()


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
    "logit_normal": ("logit_normal", "none", False),
    "clts": ("clts", "none", False),
    "loss_second_moment": ("loss_second_moment", "none", False),
    "laplace": ("laplace", "none", False),
    "gradient_noise": ("gradient_noise", "none", False),
}
_ADAPTIVE = ("clts", "loss_second_moment", "gradient_noise")
SAMPLINGS = ("uniform", "speedit", "speed", "lognormal", "logit_normal", "laplace", *_ADAPTIVE)
WEIGHTINGS = ("none", "p2", "change_aware", "min_snr", "edm", "flow")


def _choose(kind: str, name: str, choices) -> str:
    if name not in choices:
        raise UserError(f"unknown timesteps.{kind} {name!r}; choose one of {', '.join(choices)}")
    return name


def _make_weights(
    schedule: Schedule, prediction: str | np.ndarray, weighting: str, lam: float, gamma: float, sigma_data: float
) -> np.ndarray:
    """The weights on the mse of `prediction`. [T]

    Raises:
      UserError: float32, in which losses are, does not hold them, or the schedule is too short for them.
    """
    if weighting == "none":
        return np.ones(schedule.num_steps)
    if weighting == "change_aware":
        return _change_aware_weights(schedule, lam)
    snr = _snr(schedule)
    of_epsilon = {
        "p2": 1.0 - schedule.alphas_cumprod,
        "min_snr": np.minimum(1.0, gamma / snr),
        "edm": 1.0 + 1.0 / (snr * sigma_data**2),
        "flow": (1.0 + 1.0 / np.sqrt(snr)) ** 2,
    }[weighting]
    # One over the mse of each prediction where that of epsilon is 1.
    worth = {"epsilon": 1.0, "x0": snr, "v": schedule.alphas_cumprod}
    weights = of_epsilon * (worth[prediction] if isinstance(prediction, str) else prediction)
    if weights.max() > np.finfo(np.float32).max:
        raise UserError(
            f"timesteps.weighting={weighting}: its weights grow to {weights.max():.0e}, more than float32 holds; set"
            " diffusion.prediction=v, or choose a smaller diffusion.beta_end"
        )
    return weights


def make_strategy(
    schedule: Schedule,
    strategy: str,
    *,
    prediction: str | np.ndarray = "epsilon",
    sampling: str | None = None,
    weighting: str | None = None,
    dual: bool | None = None,
    k: float = 5.0,
    tau: float = 700.0,
    lam: float = 0.6,
    gamma: float = 5.0,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
    sigma_data: float = 0.5,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    clts_mean: float = 300.0,
    clts_std: float = 250.0,
    clts_steps: int = 50_000,
    laplace_mean: float = 0.0,
    laplace_scale: float = 0.5,
    probe_every: int = 100,
) -> Strategy:
    """The strategy called `strategy`, with any of its three parts replaced.

    Args:
      schedule: of training.
      strategy: one of PRESETS.
      prediction: what the network predicts, whose mse the weights multiply: epsilon, x0 or v; of a flow, its `worth` [T].
      sampling, weighting, dual: None keeps the preset's part.
      k, tau: of density (3): how many times more often the first tau steps (of 1000; scaled with T) are drawn; k >= 1.
      lam: lambda of weight (6), in [0.5, 1]; 0.5 weights all steps alike.
      gamma: of weight (9), positive.
      log_sigma_mean, log_sigma_std: m and d of density (8).
      sigma_data: sd of weight (13), positive.
      logit_mean, logit_std: m and d of density (10).
      clts_mean, clts_std, clts_steps: of density (11): mu and sd, of 1000 steps, scaled with T; and how many optimizer steps
        the way from uniform takes.
      laplace_mean, laplace_scale: m and b of density (15).
      probe_every: of density (16): optimizer steps between two measurements, positive.

    Raises:
      UserError: an unknown name or a number out of range.
    """
    preset = PRESETS[_choose("strategy", strategy, PRESETS)]
    sampling = _choose("sampling", preset[0] if sampling is None else sampling, SAMPLINGS)
    weighting = _choose("weighting", preset[1] if weighting is None else weighting, WEIGHTINGS)
    dual = preset[2] if dual is None else dual
    if not 1 <= k < math.inf:
        raise UserError(f"timesteps.k={k}: must be finite and at least 1")
    if not 1 <= tau < 1000:
        raise UserError(f"timesteps.tau={tau}: must lie between 1 and 1000: thousandths of the schedule, 700 for a share of 0.7")
    if not 0.5 <= lam <= 1:
        raise UserError(f"timesteps.lam={lam}: must lie in [0.5, 1]")
    positive = {
        "gamma": gamma,
        "log_sigma_std": log_sigma_std,
        "sigma_data": sigma_data,
        "logit_std": logit_std,
        "clts_std": clts_std,
        "clts_steps": clts_steps,
        "laplace_scale": laplace_scale,
        "probe_every": probe_every,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"timesteps.{name}={value}: must be finite and positive")
    means = {
        "log_sigma_mean": log_sigma_mean,
        "logit_mean": logit_mean,
        "clts_mean": clts_mean,
        "laplace_mean": laplace_mean,
    }
    for name, value in means.items():
        if not math.isfinite(value):
            raise UserError(f"timesteps.{name}={value}: must be finite")

    name = strategy
    if (sampling, weighting, dual) != preset:
        name = f"{strategy} with sampling={sampling}, weighting={weighting}, dual={dual}"
    uniform = np.full(schedule.num_steps, 1 / schedule.num_steps)
    weights = _make_weights(schedule, prediction, weighting, lam, gamma, sigma_data)
    if sampling in _ADAPTIVE:
        if dual:
            raise UserError(f"timesteps.dual pairs draws of a fixed density, but timesteps.sampling={sampling} has none")
        if sampling == "clts":
            return CurriculumStrategy(name, uniform, _gaussian_density(schedule, clts_mean, clts_std), clts_steps, weights)
        if sampling == "gradient_noise":
            return GradientNoiseStrategy(name, weights, probe_every, bins=min(8, schedule.num_steps))
        return LossSecondMomentStrategy(name, weights)
    density = {
        "uniform": lambda: uniform,
        "speedit": lambda: _speedit_density(schedule),
        "speed": lambda: _speed_density(schedule, k, tau),
        "lognormal": lambda: _lognormal_density(schedule, log_sigma_mean, log_sigma_std),
        "logit_normal": lambda: _lognormal_density(schedule, logit_mean, logit_std),
        "laplace": lambda: _laplace_density(schedule, laplace_mean, laplace_scale),
    }[sampling]()
    pivot = None
    if dual:
        # The paper's density brings its own boundary: pairing it about M instead would undo most of its suppression.
        pivot = _speed_boundary(schedule, tau) if sampling == "speed" else meaningful_steps(schedule)
    return TableStrategy(name, density, weights, pivot)
