"""scheduler_config.json against what diffusers makes of it."""

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.conversion import scheduler
from speedit_jax.diffusion.schedules import make_schedule, sampling_steps
from speedit_jax.interop.pipeline import scheduler_config

DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}


def betas(values):
    keys = ("schedule", "num_steps", "beta_start", "beta_end")
    name, *rest = (values[f"diffusion.{key}"] for key in keys)
    return make_schedule(name, *rest).betas


SCHEDULERS = {
    "published": {},
    "Stable Diffusion's": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "shorter": {"num_train_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.08},
    "shorter, unscaled": {"num_train_timesteps": 250},
    "longer": {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    "trained, linear": {"num_train_timesteps": 500, "trained_betas": np.linspace(0.001, 0.03, 500, dtype=np.float32).tolist()},
    "trained, quad": {"num_train_timesteps": 300, "trained_betas": make_schedule("quad", 300).betas.tolist()},
    "trained, cosine": {
        "num_train_timesteps": 300,
        "trained_betas": make_schedule("cosine", 300).betas.astype(np.float32).tolist(),
    },
    "trained, const": {"trained_betas": make_schedule("const", 1000).betas.tolist()},
    "short": {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.5},
    "without a stride of 50": {"num_train_timesteps": 80},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing"},
    "trailing, of a number that does not divide": {"timestep_spacing": "trailing", "num_train_timesteps": 990},
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_it_is_diffusers_schedule(case):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    config = DDIM | SCHEDULERS[case]
    theirs = diffusers.DDIMScheduler.from_config(config)
    values, lines = scheduler.read(config)
    assert lines == []
    # diffusers computes betas in float32, and 1 - beta there loses what is below 6e-8.
    np.testing.assert_allclose(betas(values), theirs.betas.numpy(), rtol=1e-5, atol=1e-7)
    if "sampling.num_steps" in values:
        theirs.set_timesteps(min(50, len(theirs.betas)))
        steps = sampling_steps(len(theirs.betas), values["sampling.num_steps"])
        np.testing.assert_array_equal(steps, theirs.timesteps.numpy()[::-1])
    assert scheduler.PREDICTION_TYPES[values["diffusion.prediction"]] == theirs.config.prediction_type


@pytest.mark.parametrize("case", SCHEDULERS)
def test_it_goes_out_and_in(case):
    config = DDIM | SCHEDULERS[case]
    values, _ = scheduler.read(config)
    prediction = scheduler.PREDICTION_TYPES[values["diffusion.prediction"]]
    back, _ = scheduler.read(scheduler_config(betas(values), prediction, values.get("sampling.num_steps", 50)))
    np.testing.assert_allclose(betas(back), betas(values), rtol=1e-12)
    assert {key: back[key] for key in back if "beta" not in key} == {key: values[key] for key in values if "beta" not in key}


def test_the_published_schedule_needs_no_betas():
    for config in (DDIM, DDIM | {"trained_betas": make_schedule("linear", 1000).betas.tolist()}):
        values, _ = scheduler.read(config)
        assert values["diffusion.schedule"] == "linear" and values["diffusion.beta_start"] == values["diffusion.beta_end"] == 0.0


@pytest.mark.parametrize(
    "change, key",
    [
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid"),
        ({"trained_betas": [0.1, 0.5, 0.2, 0.3], "num_train_timesteps": 4}, "trained_betas=4 numbers"),
        ({"trained_betas": [0.1, 0.5, 0.2, 0.3]}, "num_train_timesteps=1000 and trained_betas of 4"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"thresholding": True}, "thresholding=True"),
        ({"clip_sample": True}, "clip_sample=True"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing=linspace"),
        ({"steps_offset": 1}, "steps_offset=1"),
    ],
)
def test_what_has_no_equivalent_is_named(change, key):
    assert_one_line(lambda: scheduler.read(DDIM | change), f"scheduler_config.json has {key}", "--from=DIR/transformer")


def test_betas_that_are_none():
    assert_one_line(lambda: scheduler.read(DDIM | {"beta_start": "x"}), "scheduler_config.json", "not numbers")
    assert_one_line(lambda: scheduler.read({"_class_name": "FlowMatchEulerDiscreteScheduler"}), "_class_name=FlowMatchEuler")


def test_another_sampler_is_a_line():
    values, lines = scheduler.read(DDIM | {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"})
    assert "sampling.num_steps" not in values and values["diffusion.schedule"] == "linear"
    assert len(lines) == 1 and "DPMSolverMultistepScheduler" in lines[0]
