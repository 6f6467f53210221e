r"""Noise schedules as frozen float64 tables.

With :math:`\beta_t` the variance added at step t in 0..T-1 (Ho et al. 2020, arXiv 2006.11239; IDDPM, arXiv 2102.09672):

  (1)  alpha_t      = 1 - beta_t
  (2)  abar_t       = prod_{s <= t} alpha_s                         abar_{-1} = 1
  (3)  q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
  (4)  q(x_{t-1} | x_t, x_0) = N(c1_t x_0 + c2_t x_t, btilde_t I)
       btilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
       c1_t     = beta_t sqrt(abar_{t-1}) / (1 - abar_t)
       c2_t     = (1 - abar_{t-1}) sqrt(alpha_t) / (1 - abar_t)

Noise levels of T steps, from b_0 = s 1e-4 to b_1 = s 0.02 unless others are given, where s = 1000 / T
  (5)  linear:  beta_t = b_0 + (b_1 - b_0) t / (T - 1)                        Ho et al.
  (6)  quad:    beta_t = (sqrt(b_0) + (sqrt(b_1) - sqrt(b_0)) t / (T - 1))^2
  (7)  const:   beta_t = s 0.02
  (8)  squaredcos_cap_v2, cosine:  abar_t = f((t + 1) / T) / f(0), beta_t <= 0.999     IDDPM eq. (17)
       f(u) = cos^2((u + 0.008) / 1.008 pi / 2)

Tables are computed in float64 whatever the precision of the model; they are cast where they meet an array.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from speedit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving noise schedule.

    Attributes:
      name: what the user called it; error messages use it.
      betas: [T] float64 in (0, 1].
      model_steps: [T] int, the step the network is told for each of our steps: the identity unless respaced.
    """

    name: str
    betas: np.ndarray
    model_steps: np.ndarray

    def __post_init__(self):
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas of schedule {self.name!r} must be one-dimensional and in (0, 1]")

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, eq. (2). [T]"""
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """abar_{t-1}. [T]"""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """sqrt(1 - abar_t), the standard deviation of the noise in x_t, eq. (3). [T]"""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """btilde_t, eq. (4); zero at t = 0. [T]"""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log btilde_t, with the t = 0 entry, which would be -inf, replaced by the next one (as in DDPM). [T]"""
        variance = self.posterior_variance
        return np.log(np.append(variance[min(1, len(variance) - 1)], variance[1:]).clip(min=1e-300))

    @functools.cached_property
    def posterior_mean_coef_x0(self) -> np.ndarray:
        """c1_t, eq. (4). [T]"""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_mean_coef_xt(self) -> np.ndarray:
        """c2_t, eq. (4). [T]"""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


# Ho et al.'s first and last beta, of 1000 steps; scaled by 1000 / T, so that any T ends at about the same abar.
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02


def _linear(num_steps: int, first: float = 0.0, last: float = 0.0) -> np.ndarray:
    scale = 1000 / num_steps
    return np.linspace(first or scale * _FIRST_BETA, last or scale * _LAST_BETA, num_steps, dtype=np.float64)


def _quad(num_steps: int, first: float = 0.0, last: float = 0.0) -> np.ndarray:
    scale = 1000 / num_steps
    first, last = first / scale or _FIRST_BETA, last / scale or _LAST_BETA
    return scale * np.linspace(math.sqrt(first), math.sqrt(last), num_steps, dtype=np.float64) ** 2


def _const(num_steps: int) -> np.ndarray:
    return np.full(num_steps, 1000 / num_steps * _LAST_BETA)


def _squaredcos_cap_v2(num_steps: int, max_beta: float = 0.999) -> np.ndarray:
    # IDDPM eq. (17): abar(u) = cos^2((u + s) / (1 + s) pi / 2), s = 0.008, betas capped near u = 1.
    def abar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - abar((i + 1) / num_steps) / abar(i / num_steps), max_beta) for i in range(num_steps)])


# `cosine` is what SpeeD calls squaredcos_cap_v2, `quad` is diffusers' scaled_linear.
SCHEDULES = {
    "linear": _linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "cosine": _squaredcos_cap_v2,
    "quad": _quad,
    "const": _const,
}
_WITH_ENDS = ("linear", "quad")
_LEAST_ABAR = 1e-70  # whose 1 / sqrt(abar), by which an image is predicted from the noise, is still a float32


def make_schedule(name: str, num_steps: int, beta_start: float = 0.0, beta_end: float = 0.0) -> Schedule:
    """The schedule `name` with `num_steps` noise levels.

    Args:
      beta_start, beta_end: first and last beta of linear and quad; 0 takes 1000 / T times 1e-4 and 0.02.

    Raises:
      UserError: unknown name, or a number of steps or betas that the schedule is not defined for.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown diffusion.schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if num_steps < 2:
        raise UserError(f"diffusion.num_steps={num_steps}: at least 2 noise levels are needed")
    for key, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if value and name not in _WITH_ENDS:
            raise UserError(f"diffusion.{key}={value}: diffusion.schedule={name!r} has none; {' and '.join(_WITH_ENDS)} have")
        if not 0 <= value < 1:
            raise UserError(f"diffusion.{key}={value}: must lie in [0, 1); 0 is the schedule's own")
    betas = SCHEDULES[name](num_steps, *((beta_start, beta_end) if name in _WITH_ENDS else ()))
    if betas.max() >= 1:
        raise UserError(
            f"diffusion.schedule={name!r} with diffusion.num_steps={num_steps} has a beta of {betas.max():.3g}; use more steps"
        )
    if (left := np.prod(1 - betas)) < _LEAST_ABAR:
        raise UserError(
            f"diffusion.beta_start={beta_start}, diffusion.beta_end={beta_end}: abar falls to {left:.1g} over {num_steps} steps,"
            " so little that float32 cannot take the image back from it; choose smaller ones"
        )
    return Schedule(name, betas, np.arange(num_steps))


def respace(schedule: Schedule, steps: Sequence[int]) -> Schedule:
    """The schedule restricted to `steps`, with betas such that abar is unchanged there (IDDPM section 4).

    Args:
      steps: increasing indices into `schedule`.

    Returns:
      A schedule of len(steps) levels whose `model_steps` still tells the network the original index.
    """
    steps = np.asarray(steps)
    if steps.size == 0 or steps[0] < 0 or steps[-1] >= schedule.num_steps or (np.diff(steps) <= 0).any():
        raise ValueError(f"steps must increase within 0..{schedule.num_steps - 1}")
    kept = schedule.alphas_cumprod[steps]
    # Of a step that leaves less than a rounding of 1, beta would be 1 and abar 0, from which nothing can be predicted.
    betas = np.minimum(1.0 - kept / np.append(1.0, kept[:-1]), 1.0 - 2.0**-53)
    return Schedule(f"{schedule.name} respaced to {len(steps)}", betas, schedule.model_steps[steps])


def even_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` indices of 0..num_steps-1, evenly spaced with both ends kept: IDDPM's respacing to one section.

    Raises:
      UserError: count is not in 1..num_steps.
    """
    if not 1 <= count <= num_steps:
        raise UserError(f"{count} sampling steps asked for, but the schedule has 1..{num_steps}")
    if count == 1:
        # IDDPM's rule would keep step 0, the least noisy, from which no sample can be drawn.
        return np.array([num_steps - 1])
    stride = (num_steps - 1) / (count - 1)
    # The running sum and the rounding half to even are IDDPM's: other ways differ by one here and there.
    return np.array([round(i) for i in np.cumsum([0.0] + [stride] * (count - 1))])


def sampling_steps(num_steps: int, spec: int | str | Sequence[int]) -> np.ndarray:
    """Which of the steps 0..num_steps-1 to sample at, as IDDPM's respacing writes it. [count] int, increasing

    Args:
      num_steps: of the schedule of training.
      spec: 250 or "250": so many, even over the whole schedule (`even_steps`);
        "ddim50": 50 at a fixed stride from step 0, as in DDIM: the last steps may be left out;
        "trailing50": 50 evenly spaced back from the last step, the first left out (Lin et al., arXiv 2305.08891, table 2);
        "10,15,20" or (10, 15, 20): so many of each of three equal sections, the least noisy first, with both ends of each.

    Raises:
      UserError: a spec that cannot be read, or more steps than there are.
    """
    text = ",".join(map(str, spec)) if isinstance(spec, list | tuple) else str(spec)
    stride_count = text.removeprefix("ddim")
    if text.startswith("ddim") and stride_count.isdecimal():
        for stride in range(1, num_steps):
            steps = np.arange(0, num_steps, stride)
            if len(steps) == int(stride_count):
                return steps
        raise UserError(
            f"{text}: no stride gives exactly {stride_count} of {num_steps} steps; use num_steps={stride_count} for even spacing"
        )
    trailing = text.removeprefix("trailing")
    if text.startswith("trailing") and trailing.isdecimal() and 1 <= int(trailing) <= num_steps:
        return np.round(np.arange(num_steps, 0, -num_steps / int(trailing)))[: int(trailing)].astype(int)[::-1] - 1
    counts = [count.strip() for count in text.split(",")]
    if len(counts) == 1 and counts[0].removeprefix("-").isdecimal():
        return even_steps(num_steps, int(counts[0]))
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UserError(f"{text!r} is not a valid number of sampling steps; use 50, ddim50, trailing50, or 10,15,20 for sections")
    start, sections = 0, []
    for i, count in enumerate(map(int, counts)):
        size = num_steps // len(counts) + (i < num_steps % len(counts))
        if count > size:
            raise UserError(f"{text}: {count} sampling steps asked of a section of {size}")
        # One step of a section is its first, as in IDDPM; of the whole schedule it would be the least noisy.
        sections.append(start + (even_steps(size, count) if count > 1 else np.array([0])))
        start += size
    return np.concatenate(sections)
