"""Our DiT and predictions against diffusers', recorded by fixtures/make_diffusers_dit.py and make_diffusers_predictions.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.diffusion.gaussian import PREDICTIONS, GaussianDiffusion
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.interop import dit
from speedit_jax.models.build import build

EMBEDDERS = "norm1.emb."


def diffusers_state(arrays):
    """The whole state_dict: the later blocks' embedders are the first's, and recorded once."""
    state = section(arrays, "state/")
    shared = {name: value for name, value in state.items() if EMBEDDERS in name}
    return state | {name.replace("blocks.0.", "blocks.1."): value for name, value in shared.items()}


@pytest.fixture(scope="module")
def arrays():
    return load("diffusers_dit")


def output(arrays, shift):
    config = get_config("DiT-tiny/2").model
    config.update({"width": 16, "depth": 2, "heads": 2, "time_freq_shift": shift})
    model = build(config, image_shape=(8, 8, 4), num_classes=1000, learned_variance=True, platform="cpu")
    params = dit.from_diffusers(diffusers_state(arrays), jax.eval_shape(model.init, jax.random.key(0)), patch=2)
    return np.asarray(jax.jit(model.apply)(params, nhwc(arrays["x"]), arrays["t"], arrays["y"]))


def test_forward(arrays):
    network = dit.describe_diffusers(json.loads(str(arrays["config"])))
    assert network == dit.Architecture("DiT", 16, 2, 2, 4, 8, label_rows=1001, tokens=16, heads=2)
    assert_close(output(arrays, shift=1), nhwc(arrays["out"]), 1e-5)


def test_without_the_shift_it_is_another_network(arrays):
    ours, theirs = output(arrays, shift=0), nhwc(arrays["out"])
    errors = np.linalg.norm((ours - theirs).reshape(6, -1), axis=1) / np.linalg.norm(theirs.reshape(6, -1), axis=1)
    assert errors[arrays["t"] == 0].max() < 1e-5
    assert errors[arrays["t"] >= 500].min() > 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_the_network_predicts(prediction):
    """The image and DDIM's step that its scheduler makes of an output, its velocity, in float64, and its SNR."""
    arrays = load("diffusers_predictions")
    t, schedule = arrays["t"], make_schedule("linear", 1000)
    diffusion = GaussianDiffusion(schedule, "fixed_small", prediction)
    with jax.enable_x64(True):
        x0, noise, output = (jnp.asarray(nhwc(arrays[name]), jnp.float64) for name in ("x0", "noise", "output"))
        x_t = diffusion.q_sample(x0, t, noise)
        image, eps = map(np.asarray, diffusion.predict_x0_and_eps(output, x_t, t))
        velocity = GaussianDiffusion(schedule, prediction="v").target(x0, t, noise)
    abar = schedule.alphas_cumprod[t - 1][:, None, None, None]
    for ours, theirs in (
        (image, f"{prediction}/x0"),
        (np.sqrt(abar) * image + np.sqrt(1 - abar) * eps, f"{prediction}/previous"),
        (velocity, "velocity"),
    ):
        assert_close(ours, nhwc(arrays[theirs]), 1e-10)
    # diffusers computes it in float32.
    np.testing.assert_allclose(schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t]), arrays["snr"], rtol=1e-6)
