"""From a config to its parts."""

import numpy as np
import pytest
import tiny

from speedit_jax.diffusion.gaussian import PREDICTIONS
from speedit_jax.training import assembly


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
