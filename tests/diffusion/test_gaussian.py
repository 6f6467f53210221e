"""The forward process, the reverse step and the losses against definitions integrated or solved in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from speedit_jax.diffusion.gaussian import LOSSES, PREDICTIONS, VARIANCES, GaussianDiffusion
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import make_schedule, respace
from speedit_jax.errors import UserError

SCHEDULE = make_schedule("linear", 1000)
T = np.array([0, 1, 100, 500, 999])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def normal(seed, shape=(5, 4, 4, 3)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.result_type(float))


def test_q_sample_is_the_marginal():
    x0, noise = normal(0), normal(1)
    abar = SCHEDULE.alphas_cumprod[T][:, None, None, None]
    expected = np.sqrt(abar) * np.asarray(x0, np.float64) + np.sqrt(1 - abar) * np.asarray(noise, np.float64)
    got = GaussianDiffusion(SCHEDULE).q_sample(x0, jnp.asarray(T), noise)
    assert got.dtype == jnp.float32
    # Three float32 roundings of terms below 5.
    np.testing.assert_allclose(got, expected, atol=3 * 5 * 2**-24)


def test_x0_and_eps_predict_each_other(x64):
    diffusion, t = GaussianDiffusion(SCHEDULE), jnp.asarray(T)
    x0, noise = normal(0), normal(1)
    x_t = diffusion.q_sample(x0, t, noise)
    np.testing.assert_allclose(diffusion.predict_x0(x_t, t, noise), x0, atol=1e-11)
    np.testing.assert_allclose(diffusion.predict_eps(x_t, t, x0), noise, atol=1e-11)
    eps = normal(2)
    np.testing.assert_allclose(diffusion.predict_eps(x_t, t, diffusion.predict_x0(x_t, t, eps)), eps, atol=1e-11)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_perfect_prediction_has_no_mse_and_the_true_posterior_mean(variance, x64):
    diffusion, t = GaussianDiffusion(SCHEDULE, variance), jnp.asarray(T)
    x0, noise = normal(0), normal(1)
    x_t = diffusion.q_sample(x0, t, noise)
    output = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1) if diffusion.learned_variance else noise
    terms = jax.jit(diffusion.losses)(output, x0, x_t, t, noise)
    np.testing.assert_array_equal(terms["mse"], 0)
    mean, _, x0_hat = diffusion.p_mean_log_variance(output, x_t, t)
    np.testing.assert_allclose(x0_hat, x0, atol=1e-11)
    np.testing.assert_allclose(mean, diffusion.posterior_mean(x0, x_t, t), atol=1e-11)
    assert ("vb" in terms) == diffusion.learned_variance
    if diffusion.learned_variance:
        # v = -1 is the true variance too, so that nothing is left of the KL.
        np.testing.assert_allclose(terms["vb"][1:], 0, atol=1e-11)


def test_mse_is_the_mean_over_everything_but_the_batch():
    diffusion = GaussianDiffusion(SCHEDULE, "fixed_small")
    noise, error = normal(1), jnp.arange(5.0)[:, None, None, None]
    terms = diffusion.losses(noise + error, normal(0), normal(2), jnp.asarray(T), noise)
    np.testing.assert_allclose(terms["mse"], np.arange(5.0) ** 2, rtol=1e-5, atol=1e-12)


def test_learned_variance_interpolates_logs_between_btilde_and_beta(x64):
    diffusion, t = GaussianDiffusion(SCHEDULE), jnp.asarray(T)
    log_beta = np.log(SCHEDULE.betas[T])
    log_btilde = np.log(SCHEDULE.posterior_variance[np.maximum(T, 1)])
    for v, expected in (
        (1, log_beta),
        (-1, log_btilde),
        (0, (log_beta + log_btilde) / 2),
        (2, 1.5 * log_beta - 0.5 * log_btilde),
    ):
        output = jnp.concatenate([jnp.zeros((5, 2, 2, 3)), jnp.full((5, 2, 2, 3), v)], axis=-1)
        _, log_variance, _ = diffusion.p_mean_log_variance(output, normal(0, (5, 2, 2, 3)), t)
        np.testing.assert_allclose(log_variance, np.broadcast_to(expected[:, None, None, None], (5, 2, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("variance, table", [("fixed_small", SCHEDULE.posterior_variance), ("fixed_large", SCHEDULE.betas)])
def test_fixed_variances(variance, table, x64):
    _, log_variance, _ = GaussianDiffusion(SCHEDULE, variance).p_mean_log_variance(normal(0), normal(1), jnp.asarray(T))
    # At t = 0 both take the second entry of btilde: btilde_0 is zero, and beta_0 gives a worse decoder.
    expected = np.append(SCHEDULE.posterior_variance[1], table[T[1:]])
    np.testing.assert_allclose(np.exp(log_variance).squeeze(), expected, rtol=1e-12)


def test_clipping_bounds_the_predicted_image_and_moves_the_mean():
    diffusion, t = GaussianDiffusion(SCHEDULE, "fixed_small"), jnp.asarray(T)
    x_t, eps = normal(0), normal(1)
    mean, _, x0 = diffusion.p_mean_log_variance(eps, x_t, t, clip=True)
    free = diffusion.predict_x0(x_t, t, eps)
    assert jnp.abs(free).max() > 1
    np.testing.assert_array_equal(x0, np.clip(free, -1, 1))
    np.testing.assert_allclose(mean, diffusion.posterior_mean(x0, x_t, t), rtol=1e-6)


@pytest.mark.parametrize("t", [1, 17, 999])
def test_vb_is_the_kl_integral_in_bits(t, x64):
    diffusion = GaussianDiffusion(SCHEDULE)
    x0, x_t, eps, v = 0.3, -0.4, 0.5, 0.2
    shape, at = (1, 1, 1, 1), jnp.array([t])
    output = jnp.array([eps, v]).reshape(1, 1, 1, 2)
    got = jax.jit(diffusion.variational_bound)(output, jnp.full(shape, x0), jnp.full(shape, x_t), at)

    abar, abar_prev, beta = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1], SCHEDULE.betas[t]
    btilde = beta * (1 - abar_prev) / (1 - abar)

    def posterior(x0, log_variance):
        mean = beta * np.sqrt(abar_prev) / (1 - abar) * x0 + (1 - abar_prev) * np.sqrt(1 - beta) / (1 - abar) * x_t
        return stats.norm(mean, np.exp(log_variance / 2))

    q = posterior(x0, np.log(btilde))
    p = posterior((x_t - np.sqrt(1 - abar) * eps) / np.sqrt(abar), 0.6 * np.log(beta) + 0.4 * np.log(btilde))
    integrand = lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x))  # noqa: E731
    nats, error = integrate.quad(integrand, q.mean() - 12 * q.std(), q.mean() + 12 * q.std(), epsabs=1e-12, epsrel=1e-10)
    np.testing.assert_allclose(got, nats / np.log(2), rtol=1e-8, atol=error)


def bin_masses(x0_hat, v):
    """exp(-vb_0) of the 256 grey values, each as an image of one pixel."""
    diffusion, t = GaussianDiffusion(SCHEDULE), jnp.zeros(256, int)
    x_t = jnp.full((256, 1, 1, 1), 0.1)
    eps = diffusion.predict_eps(x_t, t, jnp.full_like(x_t, x0_hat))
    output = jnp.concatenate([eps, jnp.full_like(eps, v)], axis=-1)
    grey = jnp.linspace(-1, 1, 256).reshape(256, 1, 1, 1)
    return 2.0 ** -np.asarray(jax.jit(diffusion.variational_bound)(output, grey, x_t, t))


@pytest.mark.parametrize("x0_hat", [-1.0, -0.3, 0.5, 1.2])
@pytest.mark.parametrize("v", [-1, 1, -20])
def test_the_decoder_is_a_distribution_over_grey_values(x0_hat, v, x64):
    # Every bin is kept at 1e-12 or more.
    np.testing.assert_allclose(bin_masses(x0_hat, v).sum(), 1, atol=256e-12)


@pytest.mark.parametrize("x0_hat", [-1.0, -0.3, 0.5])
def test_the_decoder_integrates_the_normal_density(x0_hat, x64):
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 256)[:-1] + 1 / 255, [np.inf]])
    # At t = 0 the mean is x0_hat, and v = 1 makes the variance beta_0. Page's approximation of the CDF errs by up to 1.8e-4.
    expected = np.diff(stats.norm.cdf(edges, x0_hat, np.sqrt(SCHEDULE.betas[0])))
    np.testing.assert_allclose(bin_masses(x0_hat, 1), expected, atol=2 * 1.8e-4)


def test_vb_trains_the_variance_and_never_the_mean():
    diffusion, t = GaussianDiffusion(SCHEDULE), jnp.asarray(T)
    x0, noise = normal(0).clip(-1, 1), normal(1)
    x_t = diffusion.q_sample(x0, t, noise)
    output = normal(2, (5, 4, 4, 6))
    gradient = jax.jit(jax.grad(lambda out: diffusion.losses(out, x0, x_t, t, noise)["vb"].sum()))(output)
    np.testing.assert_array_equal(gradient[..., :3], 0)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient[..., 3:]).max(axis=(1, 2, 3)) > 0).all()
    gradient = jax.jit(jax.grad(lambda out: diffusion.losses(out, x0, x_t, t, noise)["mse"].sum()))(output)
    np.testing.assert_allclose(gradient[..., :3], 2 * (output[..., :3] - noise) / 48, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[..., 3:], 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_schedule_of_one_step_has_a_finite_reverse_step(variance):
    diffusion = GaussianDiffusion(respace(SCHEDULE, [999]), variance)
    output = normal(0, (5, 4, 4, 6 if diffusion.learned_variance else 3)).clip(-1, 1)
    mean, log_variance, _ = diffusion.p_mean_log_variance(output, normal(1), jnp.zeros(5, int))
    assert np.isfinite(mean).all()
    assert np.isfinite(np.exp(log_variance)).all()


def test_unknown_variance():
    with pytest.raises(UserError, match=r"diffusion\.variance 'learned'.*learned_range, fixed_small, fixed_large"):
        GaussianDiffusion(SCHEDULE, "learned")


def states(x0, x_t, t):
    """The same image x0, as the output of a network of each prediction: {prediction: output}, in float64."""
    abar = SCHEDULE.alphas_cumprod[T][:, None, None, None]
    eps = (np.asarray(x_t) - np.sqrt(abar) * np.asarray(x0)) / np.sqrt(1 - abar)
    return {"epsilon": eps, "x0": np.asarray(x0), "v": np.sqrt(abar) * eps - np.sqrt(1 - abar) * np.asarray(x0)}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_the_state_of_the_true_image(prediction, x64):
    diffusion, t = GaussianDiffusion(SCHEDULE, prediction=prediction), jnp.asarray(T)
    x0, noise = normal(0), normal(1)
    x_t = diffusion.q_sample(x0, t, noise)
    np.testing.assert_allclose(diffusion.target(x0, t, noise), states(x0, x_t, t)[prediction], atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_one_error_in_every_prediction(variance, prediction, x64):
    """Networks of different predictions that mean the same image have the same reverse step; their mse differ by the SNR."""
    diffusion, t = GaussianDiffusion(SCHEDULE, variance, prediction), jnp.asarray(T)
    x0, noise, wrong, r = normal(0), normal(1), normal(2), normal(3)
    x_t = diffusion.q_sample(x0, t, noise)

    def everything(diffusion, said):
        output = jnp.concatenate([said, r], axis=-1) if diffusion.learned_variance else said
        step = diffusion.predict_x0_and_eps(output, x_t, t), diffusion.p_mean_log_variance(output, x_t, t)
        return step, diffusion.losses(output, x0, x_t, t, noise)

    step, terms = everything(diffusion, states(wrong, x_t, t)[prediction])
    expected_step, expected_terms = everything(GaussianDiffusion(SCHEDULE, variance), states(wrong, x_t, t)["epsilon"])
    np.testing.assert_allclose(step[0][0], wrong, atol=1e-10)
    np.testing.assert_allclose(step[0][1], states(wrong, x_t, t)["epsilon"], atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), step, expected_step)
    snr = SCHEDULE.alphas_cumprod[T] / (1 - SCHEDULE.alphas_cumprod[T])
    mse_x0 = ((np.asarray(x0) - wrong) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(terms["mse"], {"epsilon": snr, "x0": 1, "v": snr + 1}[prediction] * mse_x0, rtol=1e-9)
    assert terms.keys() == expected_terms.keys()
    if diffusion.learned_variance:
        np.testing.assert_allclose(terms["vb"], expected_terms["vb"], rtol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_clipped_image_brings_its_noise_along(prediction, x64):
    diffusion, t = GaussianDiffusion(SCHEDULE, "fixed_small", prediction), jnp.asarray(T)
    x_t, far = normal(0), 3 * normal(1)
    x0, eps = diffusion.predict_x0_and_eps(jnp.asarray(states(far, x_t, t)[prediction]), x_t, t, clip=True)
    np.testing.assert_allclose(x0, np.clip(far, -1, 1), atol=1e-10)
    np.testing.assert_allclose(diffusion.q_sample(x0, t, eps), x_t, atol=1e-10)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_do_not_depend_on_the_prediction(sampler, prediction, x64):
    """A network that always sees the same image, in what it predicts of it."""
    image, start = normal(0, (2, 2, 2, 1)).clip(-1, 1) / 2, normal(1, (2, 2, 2, 1))

    def draw(prediction):
        diffusion = GaussianDiffusion(SCHEDULE, "fixed_small", prediction)

        def network(x, t):
            eps = diffusion.predict_eps(x, t, image)
            return diffusion.target(image, t, eps)

        return sample(network, start, diffusion, lambda k: jnp.sin(k + start), sampler=sampler, num_steps=5)

    np.testing.assert_allclose(draw(prediction), draw("epsilon"), atol=1e-9)


def test_vb_trains_the_variance_and_never_the_mean_of_any_prediction():
    t, x0, noise, output = jnp.asarray(T), normal(0).clip(-1, 1), normal(1), normal(2, (5, 4, 4, 6))
    for prediction in ("x0", "v"):
        diffusion = GaussianDiffusion(SCHEDULE, prediction=prediction)
        x_t = diffusion.q_sample(x0, t, noise)
        gradient = jax.jit(jax.grad(lambda out, d=diffusion, x=x_t: d.losses(out, x0, x, t, noise)["vb"].sum()))(output)
        np.testing.assert_array_equal(gradient[..., :3], 0)
        assert (np.abs(gradient[..., 3:]).max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_weight_multiplies_the_mse_or_the_bound_alone(variance, loss):
    diffusion, t = GaussianDiffusion(respace(SCHEDULE, range(0, 1000, 4)), variance, loss=loss), jnp.array([0, 1, 25, 125, 249])
    x0, noise = normal(0).clip(-1, 1), normal(1)
    output = normal(2, (5, 4, 4, 6 if diffusion.learned_variance else 3))
    terms = diffusion.losses(output, x0, diffusion.q_sample(x0, t, noise), t, noise)
    weight = jnp.array([0.0, 1.0, 0.5, 2.0, 3.0])
    vb = np.asarray(terms.get("vb", 0.0))
    expected = {
        "mse": weight * terms["mse"] + vb,
        "rescaled_mse": weight * terms["mse"] + 0.25 * vb,
        "kl": weight * vb,
        "rescaled_kl": 250 * weight * vb,
    }[loss]
    np.testing.assert_allclose(diffusion.objective(terms, weight), expected, rtol=1e-6)
    assert ("vb" in terms) == (diffusion.learned_variance or "kl" in loss)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_alone_trains_the_mean_too(prediction):
    diffusion, t = GaussianDiffusion(SCHEDULE, prediction=prediction, loss="kl"), jnp.asarray(T)
    x0, noise, output = normal(0).clip(-1, 1), normal(1), normal(2, (5, 4, 4, 6))
    x_t = diffusion.q_sample(x0, t, noise)
    # Near the target: a likelihood far off is at its floor, where nothing is to be learned.
    output = jnp.concatenate([diffusion.target(x0, t, noise) + 0.01 * output[..., :3], output[..., 3:]], axis=-1)
    gradient = jax.jit(jax.grad(lambda out: diffusion.losses(out, x0, x_t, t, noise)["vb"].sum()))(output)
    assert np.isfinite(gradient).all()
    for half in (gradient[..., :3], gradient[..., 3:]):
        assert (np.abs(half).max(axis=(1, 2, 3)) > 0).all()


def test_unknown_loss():
    with pytest.raises(UserError, match=r"diffusion\.loss 'l2'.*mse, rescaled_mse, kl, rescaled_kl"):
        GaussianDiffusion(SCHEDULE, loss="l2")


def test_unknown_prediction():
    with pytest.raises(UserError, match=r"diffusion\.prediction 'eps'.*epsilon, x0, v"):
        GaussianDiffusion(SCHEDULE, prediction="eps")
