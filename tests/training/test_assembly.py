"""From a config to its parts."""

import types

import numpy as np
import pytest
import tiny

from speedit_jax.data.description import Description
from speedit_jax.diffusion.gaussian import PREDICTIONS
from speedit_jax.errors import UserError
from speedit_jax.training import assembly


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_flow_predicts(prediction):
    config = tiny.make_config(diffusion__prediction=prediction, diffusion__path="gvp", diffusion__noise_scale=2.0)
    flow = assembly.make_diffusion(config)
    assert (flow.predicts_x0, flow.clamp, flow.noise_scale) == (prediction == "x0", 0.05, 2.0)
    assert flow.prediction == ("gvp x0" if prediction == "x0" else "gvp velocity")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion__noise_scale": 2.0}, r"diffusion\.noise_scale=2\.0 is for flows"),
        ({"diffusion__noise_scale": 0.0, "diffusion__path": "linear"}, r"diffusion\.noise_scale=0\.0: must be positive"),
        ({"diffusion__x0_clamp": 0.0, "diffusion__path": "linear", "diffusion__prediction": "x0"}, r"diffusion\.x0_clamp=0\.0"),
        ({"diffusion__prediction": "score", "diffusion__path": "linear"}, r"diffusion\.prediction 'score'.*epsilon, x0, v"),
    ],
)
def test_impossible_flows(changes, message):
    with pytest.raises(UserError, match=message):
        assembly.make_diffusion(tiny.make_config(**changes))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_those_of_the_prediction(prediction):
    config = tiny.make_config(diffusion__prediction=prediction, timesteps__strategy="min_snr")
    diffusion = assembly.make_diffusion(config)
    assert diffusion.prediction == prediction
    snr = diffusion.schedule.alphas_cumprod / (1 - diffusion.schedule.alphas_cumprod)
    expected = np.minimum(snr, 5) / {"epsilon": snr, "x0": 1, "v": snr + 1}[prediction]
    np.testing.assert_allclose(assembly.make_strategy(config, diffusion).weights, expected, rtol=1e-12)
    # The bound is the same whatever is predicted.
    config.diffusion.loss = "kl"
    diffusion = assembly.make_diffusion(config)
    np.testing.assert_allclose(assembly.make_strategy(config, diffusion).weights, np.minimum(snr, 5) / snr, rtol=1e-12)


def test_latents_are_drawn_by_the_autoencoder_that_encoded_them(tmp_path, monkeypatch):
    """It may be a directory or a file of weights; where it is not there, latents alone are drawn."""
    monkeypatch.setattr(assembly, "Autoencoder", lambda where, mesh: types.SimpleNamespace(where=where, check=lambda identity: 0))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae.safetensors").touch()
    for name, there in (("vae", True), ("vae.safetensors", True), ("moved", False)):
        source = Description((4, 4, 4), (), encoded_by={"vae": str(tmp_path / name)})
        found = assembly.make_autoencoder(tiny.make_config(sampling__clip=False), source, tiny.make_mesh(tiny.ONE))
        assert (found and found.where) == (str(tmp_path / name) if there else None)
