"""SpeeDiT and SpeeD for flows: what they do at a noise level of their diffusion is done at the flow's time of the same level.

A strategy is about levels of noise, and its tables are over the steps of a variance-preserving schedule. The flow's time with
the same signal-to-noise ratio takes each step's place; a density goes over with the Jacobian of that map, a factor as it is.
Strategies that are stated in the signal-to-noise ratio, or in a time of their own, are tables over the flow's levels. That of
logit_normal is the flow's own time, so its ratios move with the flow's noise_scale.
"""

import dataclasses

import numpy as np

from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.schedules import Schedule
from speedit_jax.diffusion.strategies import Strategy, TableStrategy
from speedit_jax.diffusion.timesteps import PRESETS, make_strategy

_CARRIED_SAMPLINGS = ("speedit", "speed")
_CARRIED_WEIGHTINGS = ("change_aware",)


def make_flow_strategy(flow: FlowMatching, vp: Schedule, batch_size: int, **timesteps) -> Strategy:
    """The strategy of `make_strategy` over the flow's levels.

    Args:
      vp: the schedule that SpeeDiT's and SpeeD's tables are about.
      batch_size: of the dual draw: its pairs are not carried over, but how often each step is drawn with them is.
      timesteps: as of `make_strategy`.

    Raises:
      UserError: as `make_strategy`.
    """
    there = make_strategy(vp, **timesteps)
    sampling, weighting, _ = (
        default if (chosen := timesteps.get(part)) is None else chosen
        for part, default in zip(("sampling", "weighting", "dual"), PRESETS[timesteps["strategy"]], strict=True)
    )
    carried = sampling in _CARRIED_SAMPLINGS
    own = {"sampling": "uniform", "dual": False} if carried else {}
    own["logit_mean"] = timesteps.get("logit_mean", 0.0) + np.log(flow.noise_scale)
    here = make_strategy(flow.schedule, prediction=flow.worth, **timesteps | own)
    weights = carry_weights(there.weights, vp, flow) if weighting in _CARRIED_WEIGHTINGS else here.weights
    if not carried:
        return here if weights is here.weights else dataclasses.replace(here, weights=weights)
    return TableStrategy(f"{there.name}, on the {flow.path} flow", carry_density(there.marginal(batch_size), vp, flow), weights)


def carry_density(density: np.ndarray, vp: Schedule, flow: FlowMatching) -> np.ndarray:
    """A density over the steps of `vp` as one over the flow's levels, at equal signal-to-noise ratios.

    Each step of vp stands for the flow times between the middles to its neighbours', the first and the last for all that
    is left; its probability is spread over them evenly, which is what the Jacobian of the change of variable says.

    Args:
      density: [T_vp] float64, sums to 1.

    Returns:
      [T] float64, sums to 1.
    """
    times = flow.time_of(np.sqrt(1 / vp.alphas_cumprod - 1))  # decreasing, from data to noise
    edges = np.concatenate([[0.0], 1 - (times[1:] + times[:-1]) / 2, [1.0]])
    mass_before = np.concatenate([[0.0], np.cumsum(density)])
    return np.diff(np.interp(np.linspace(0, 1, flow.num_steps + 1), edges, mass_before))


def carry_weights(weights: np.ndarray, vp: Schedule, flow: FlowMatching) -> np.ndarray:
    """Factors [T_vp] over the steps of `vp` as factors [T] over the flow's levels, at equal signal-to-noise ratios."""

    def log_ratio(schedule):
        return np.log(1 / schedule.alphas_cumprod - 1)

    return np.interp(log_ratio(flow.schedule), log_ratio(vp), weights)
