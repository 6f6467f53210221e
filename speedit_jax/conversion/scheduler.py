"""diffusers' scheduler_config.json as our noise schedule and our way to sample."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from speedit_jax.diffusion.schedules import make_schedule, sampling_steps
from speedit_jax.errors import UserError

# Of their DDIM: key -> the value that we have.
_DDIM = {
    "thresholding": False,
    "clip_sample": False,  # True clips the image and leaves the noise; ours go together, as in the published code
    "set_alpha_to_one": True,
}
_DEFAULTS = {"clip_sample": True}  # of diffusers, where it is another
_KEYS = ("diffusion.schedule", "diffusion.num_steps", "diffusion.beta_start", "diffusion.beta_end")  # as make_schedule has them
_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
PREDICTION_TYPES = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_STEPS = 50  # of DiTPipeline, unless it is told
_SPACINGS = {"leading": "ddim", "trailing": "trailing"}
_TOLERANCE = 1e-5  # relative, of betas that went through float32


def read(scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({config key: value}, lines for the user) of a scheduler_config.json.

    Raises:
      UserError: a key that changes the images has a value that we have no equivalent of.
    """
    name = scheduler.get("_class_name")
    if not any(key in scheduler for key in ("beta_schedule", "trained_betas", "beta_start")):
        _refuse("_class_name", name)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        _refuse("prediction_type", prediction)
    if scheduler.get("rescale_betas_zero_snr"):
        _refuse("rescale_betas_zero_snr", True)
    try:
        values = {"diffusion.prediction": _PREDICTIONS[prediction], **_betas(scheduler)}
    except (TypeError, ValueError, IndexError) as e:
        raise UserError(f"scheduler_config.json has betas that are not numbers ({e})") from e
    if name != "DDIMScheduler":
        return values, [f"its scheduler is a {name}, of which the noise schedule is taken; sample draws with ddim unless told"]
    for key, ours in _DDIM.items():
        if scheduler.get(key, _DEFAULTS.get(key, ours)) != ours:
            _refuse(key, not ours)
    spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
    if spacing not in _SPACINGS:
        _refuse("timestep_spacing", spacing)
    if spacing == "leading" and offset:
        _refuse("steps_offset", offset)
    steps = f"{_SPACINGS[spacing]}{min(_STEPS, values['diffusion.num_steps'])}"
    with contextlib.suppress(UserError):  # of numbers that no stride makes
        sampling_steps(values["diffusion.num_steps"], steps)
        values["sampling.num_steps"] = steps
    return values, []


def _betas(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the noise schedule."""
    betas, num_steps = scheduler.get("trained_betas"), scheduler.get("num_train_timesteps", 1000)
    if betas is not None:
        betas = np.asarray(betas, np.float64)
        if len(betas) != num_steps:
            _refuse("num_train_timesteps", f"{num_steps} and trained_betas of {len(betas)}")
        for name, ends in (("linear", True), ("quad", True), ("squaredcos_cap_v2", False)):
            values = _values(name, len(betas), *((float(betas[0]), float(betas[-1])) if ends else ()))
            with contextlib.suppress(UserError):  # which may not be made of these ends
                if np.allclose(_made(values), betas, rtol=_TOLERANCE, atol=0):
                    return values
        _refuse("trained_betas", f"{len(betas)} numbers that are neither linear nor scaled_linear nor squaredcos_cap_v2")
    name = scheduler.get("beta_schedule", "linear")
    if name not in _SCHEDULES:
        _refuse("beta_schedule", name)
    if name == "squaredcos_cap_v2":
        return _values(name, num_steps)
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    for key, value in (("beta_start", start), ("beta_end", end)):
        if not 0 < value < 1:
            _refuse(key, value)
    return _values(_SCHEDULES[name], num_steps, start, end)


def _values(name: str, num_steps: int, start: float = 0.0, end: float = 0.0) -> dict[str, Any]:
    """Ends that are the schedule's own need not be told."""
    own = np.allclose((start, end), (0.1 / num_steps, 20 / num_steps), rtol=1e-9, atol=0)
    ends = (0.0, 0.0) if own else (start, end)
    return dict(zip(_KEYS, (name, num_steps, *ends), strict=True))


def _made(values: Mapping[str, Any]) -> np.ndarray:
    return make_schedule(*(values[key] for key in _KEYS)).betas


def _refuse(key: str, value: Any) -> None:
    raise UserError(
        f"scheduler_config.json has {key}={value}, which has no equivalent here; --from=DIR/transformer takes the network alone,"
        " with the noise schedule of --config.diffusion.schedule"
    )
