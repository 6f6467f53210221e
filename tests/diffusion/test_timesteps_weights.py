"""The weights of the loss at each timestep, against their papers' formulas for each prediction."""

import numpy as np
import pytest

from speedit_jax.diffusion.gaussian import PREDICTIONS
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace
from speedit_jax.diffusion.timesteps import make_strategy
from speedit_jax.errors import UserError

LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("squaredcos_cap_v2", 1000)
SCHEDULES = (
    LINEAR,
    COSINE,
    make_schedule("quad", 1000),
    *(respace(schedule, even_steps(1000, 250)) for schedule in (LINEAR, COSINE)),
)
SNR = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
NOISE = 1 / np.sqrt(SNR)  # EDM's sigma


def test_p2_weight_is_one_over_one_plus_snr():
    for schedule in SCHEDULES:
        abar = schedule.alphas_cumprod
        np.testing.assert_allclose(make_strategy(schedule, "p2").weights, 1 / (1 + abar / (1 - abar)), rtol=1e-9)
    w = make_strategy(LINEAR, "p2").weights
    np.testing.assert_allclose(
        w[[100, 200, 300, 500, 700]], [0.10485841, 0.34365299, 0.60598888, 0.92220334, 0.99313172], atol=5e-9
    )


@pytest.mark.parametrize("lam, mean", [(0.5, 0.5), (0.6, 0.473713), (0.8, 0.421138), (1.0, 0.368563)])
def test_change_aware_weights(lam, mean):
    w = make_strategy(LINEAR, "speed_cvpr25", lam=lam).weights
    np.testing.assert_allclose([w.min(), w.max(), w.mean()], [1 - lam, lam, mean], atol=5e-7)
    if lam > 0.5:
        assert (np.argmax(w), np.argmin(w)) == (219, 999)
    # Linear in lambda: all follow from the weights of 1.
    np.testing.assert_allclose(w, 1 - lam + (2 * lam - 1) * make_strategy(LINEAR, "speed_cvpr25", lam=1).weights, atol=1e-12)


def test_change_aware_weights_need_more_than_one_change():
    assert np.isfinite(make_strategy(make_schedule("squaredcos_cap_v2", 3), "speed_cvpr25").weights).all()
    with pytest.raises(UserError, match=r"change_aware.*diffusion\.num_steps=2"):
        make_strategy(make_schedule("squaredcos_cap_v2", 2), "speed_cvpr25")


def test_change_aware_weights_of_the_default_lambda():
    strategy = make_strategy(LINEAR, "speed_cvpr25")
    w = strategy.weights
    expected = [0.40879, 0.53890, 0.6, 0.51577, 0.41472, 0.40720, 0.4]
    np.testing.assert_allclose(w[[0, 100, 219, 400, 640, 699, 999]], expected, atol=5e-6)
    # The paper's closed form: v ~ (beta_0 + D u) exp(-(beta_0 + D u / 2) t), u = t / T.
    t = np.arange(1000)
    v = (1e-4 + 0.0199 * t / 1000) * np.exp(-(1e-4 + 0.0199 * t / 2000) * t)
    np.testing.assert_allclose(w, 0.4 + 0.2 * (v - v.min()) / (v.max() - v.min()), atol=2e-3)
    effort = strategy.density * w
    np.testing.assert_allclose(effort[700:].sum() / effort.sum(), 0.064, atol=5e-4)


def test_min_snr_weights():
    w = make_strategy(LINEAR, "min_snr").weights
    np.testing.assert_allclose(w[[0, 100]], [5.0005e-4, 0.585709], rtol=2e-6)
    assert (w[130:] == 1).all() and (np.diff(w[:131]) > 0).all()
    # min(SNR, gamma) on the error of x0, which is SNR^-1/2 times that of the noise.
    snr = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
    np.testing.assert_allclose(make_strategy(LINEAR, "min_snr", gamma=1).weights, np.minimum(snr, 1) / snr, rtol=1e-12)
    # The paper's own forms for the others.
    np.testing.assert_allclose(make_strategy(LINEAR, "min_snr", prediction="x0").weights, np.minimum(snr, 5), rtol=1e-12)
    of_v = make_strategy(LINEAR, "min_snr", prediction="v").weights
    np.testing.assert_allclose(of_v, np.minimum(snr, 5) / (snr + 1), rtol=1e-12)
    assert np.argmax(of_v) == 130
    np.testing.assert_allclose(of_v[130], 0.832866, atol=5e-7)


def mse(prediction):
    """Of a network of that prediction whose image is off by one in every pixel: x_t is given, so that eps and v are off, too."""
    signal, sigma = np.sqrt(LINEAR.alphas_cumprod), LINEAR.sigmas
    eps = -signal / sigma
    return {"x0": np.ones(1000), "epsilon": eps**2, "v": (signal * eps - sigma) ** 2}[prediction]


@pytest.mark.parametrize("weighting", ["p2", "min_snr", "edm", "flow"])
def test_weights_of_an_error_minimise_the_same_whatever_is_predicted(weighting):
    losses = [make_strategy(LINEAR, "uniform", weighting=weighting, prediction=p).weights * mse(p) for p in PREDICTIONS]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-9)


@pytest.mark.parametrize(
    "strategy",
    ["uniform", "lognormal", "logit_normal", "laplace", "speed_cvpr25", "clts", "loss_second_moment", "gradient_noise"],
)
def test_factors_of_the_mse_are_the_same_whatever_is_predicted(strategy):
    weights = [make_strategy(LINEAR, strategy, prediction=p).weights for p in PREDICTIONS]
    np.testing.assert_array_equal(weights[1:], [weights[0]] * 2)


def test_p2_and_speedit_of_every_prediction():
    abar = LINEAR.alphas_cumprod
    for strategy in ("p2", "speedit"):
        for prediction, expected in (("epsilon", 1 - abar), ("x0", abar), ("v", abar * (1 - abar))):
            np.testing.assert_allclose(make_strategy(LINEAR, strategy, prediction=prediction).weights, expected, rtol=1e-12)


def test_edm_is_its_papers_weight_of_the_image():
    w = make_strategy(LINEAR, "lognormal", weighting="edm", prediction="x0", sigma_data=0.5).weights
    np.testing.assert_allclose(w, (NOISE**2 + 0.5**2) / (NOISE * 0.5) ** 2, rtol=1e-9)
    # Preconditioned by c_out = sigma sd / sqrt(sigma^2 + sd^2) the loss has weight one; for sd = 1 what is learned is -v.
    np.testing.assert_allclose(w * (NOISE * 0.5) ** 2 / (NOISE**2 + 0.5**2), 1, rtol=1e-12)
    of_v = make_strategy(LINEAR, "lognormal", weighting="edm", prediction="v", sigma_data=1.0).weights
    np.testing.assert_allclose(of_v, 1, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_flow_is_the_mse_of_the_velocity(prediction):
    # z = (1 - u) x0 + u eps of noise level u / (1 - u) is given; an image off by one makes eps off by -(1 - u) / u.
    u = NOISE / (1 + NOISE)
    velocity_error = (-(1 - u) / u - 1) ** 2
    w = make_strategy(LINEAR, "logit_normal", weighting="flow", prediction=prediction).weights
    np.testing.assert_allclose(w * mse(prediction), velocity_error, rtol=1e-9)
    if prediction == "v":
        assert w.min() >= 1 and w.max() <= 2


@pytest.mark.parametrize("weighting", ["edm", "flow"])
def test_weights_that_float32_does_not_hold(weighting):
    """Where hardly a signal is left, the mse of epsilon says nothing, and these weights grow with the noise."""
    steep = make_schedule("linear", 1000, beta_end=0.2)
    with pytest.raises(UserError, match=rf"timesteps\.weighting={weighting}: .* grow to .e\+4[67].*prediction=v"):
        make_strategy(steep, "uniform", weighting=weighting)
    for kept in ({"prediction": "v"}, {"prediction": "x0"}):
        make_strategy(steep, "uniform", weighting=weighting, **kept)
