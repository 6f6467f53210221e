"""The samplers on Gaussian data, where the perfect network is known: x_0 ~ N(MEAN, SPREAD^2) in every pixel.

All steps are affine in x and in the noise, so the moments of the samples follow exactly from a few images: the image of zero
noise is their mean, the others' distances from it are the coefficients of the starting noise and of each step's noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import SAMPLERS, sample, spaced_steps
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace
from speedit_jax.errors import UserError

LINEAR = make_schedule("linear", 1000)
MEAN, SPREAD = 0.7, 0.3
SETTINGS = [
    {"sampler": "ddpm"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "dpm++"},
    {"sampler": "dpm++", "eta": 1.0},
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def moments(schedule):
    """Mean and variance of x_t."""
    abar = schedule.alphas_cumprod
    return np.sqrt(abar) * MEAN, abar * SPREAD**2 + 1 - abar


def perfect_eps(x, t, schedule=LINEAR):
    """E[eps | x_t]."""
    mean, variance = (jnp.asarray(m)[t].reshape(-1, 1, 1, 1) for m in moments(schedule))
    return jnp.asarray(schedule.sigmas)[t].reshape(-1, 1, 1, 1) * (x - mean) / variance


def perfect_reverse_variance(schedule):
    """Var[x_{t-1} | x_t]: Bayes' rule for the Gaussians x_{t-1} and x_t | x_{t-1}."""
    previous = np.append(SPREAD**2, moments(schedule)[1][:-1])
    return 1 / (1 / previous + (1 - schedule.betas) / schedule.betas)


def sampled_moments(denoise, diffusion, start_mean, start_variance, num_steps, **settings):
    """(mean, variance, variance due to the noise of each step) of the samples of N(start_mean, start_variance) noise.

    Image k has unit noise in step k and none else, the last but one starts a standard deviation away, the last is without noise.
    """
    basis = jnp.arange(num_steps + 2)
    x = start_mean + np.sqrt(start_variance) * (basis == num_steps)
    noise = lambda k: (basis == k).astype(x.dtype).reshape(-1, 1, 1, 1)  # noqa: E731
    out = sample(denoise, x.reshape(-1, 1, 1, 1), diffusion, noise, num_steps=num_steps, **settings).squeeze()
    variances = np.asarray(out[:-1] - out[-1]) ** 2
    return float(out[-1]), variances.sum(), variances[:num_steps]


def test_it_visits_the_steps_that_are_asked_for():
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return jnp.zeros_like(x)

    start = jnp.zeros((1, 1, 1, 1))
    sample(denoise, start, GaussianDiffusion(LINEAR, "fixed_small"), lambda k: start, sampler="ddim", num_steps="2,3")
    jax.effects_barrier()
    assert seen == [999, 750, 500, 499, 0]


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_ddpm_with_the_perfect_network_is_exact_at_any_number_of_steps(name, num_steps):
    """The reverse kernels of Gaussian data are Gaussian: with their mean and variance each x_t has its true moments."""
    trained = make_schedule(name, 1000)
    schedule = respace(trained, even_steps(1000, num_steps))
    variance = perfect_reverse_variance(schedule)
    log_btilde = schedule.posterior_log_variance_clipped
    v = np.zeros(1000)
    # The inverse of eq. (3) of gaussian.py, by the step numbers of training, which are what the network sees.
    v[schedule.model_steps] = 2 * (np.log(variance) - log_btilde) / (np.log(schedule.betas) - log_btilde) - 1

    def denoise(x, t):
        output_v = jnp.broadcast_to(jnp.asarray(v)[t].reshape(-1, 1, 1, 1), x.shape)
        return jnp.concatenate([perfect_eps(x, t, trained), output_v], axis=-1)

    start = [m[-1] for m in moments(schedule)]
    mean, total, _ = sampled_moments(denoise, GaussianDiffusion(trained), *start, num_steps, sampler="ddpm")
    np.testing.assert_allclose(mean, MEAN, rtol=1e-7)  # abar_T = 2e-9 is exact to eight digits
    # The last step adds no noise, so that its variance is missing.
    np.testing.assert_allclose(total, SPREAD**2 - variance[0], rtol=1e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_with_a_fixed_variance(variance):
    """The mean is exact still; the variance would be with each step's noise scaled to the perfect one."""
    start = [m[-1] for m in moments(LINEAR)]
    mean, total, of_steps = sampled_moments(perfect_eps, GaussianDiffusion(LINEAR, variance), *start, 1000, sampler="ddpm")
    np.testing.assert_allclose(mean, MEAN, rtol=1e-8)
    perfect = perfect_reverse_variance(LINEAR)
    added = LINEAR.betas if variance == "fixed_large" else LINEAR.posterior_variance
    missing = of_steps[1:] @ (perfect[1:] / added[1:] - 1)
    np.testing.assert_allclose(total + missing, SPREAD**2 - perfect[0], rtol=1e-6)
    assert (missing > 0) == (variance == "fixed_small")
    assert abs(missing) < 0.05 * SPREAD**2


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_starting_from_pure_noise_costs_almost_nothing(settings):
    """x_T has mean sqrt(abar_T) MEAN, not 0, and enters the samples with a factor of at most their spread."""
    diffusion = GaussianDiffusion(LINEAR, "fixed_small")
    mean, total, _ = sampled_moments(perfect_eps, diffusion, 0.0, 1.0, 1000, **settings)
    assert abs(mean - MEAN) < 1.001 * np.sqrt(LINEAR.alphas_cumprod[-1]) * MEAN * np.sqrt(total)
    np.testing.assert_allclose(total, SPREAD**2, rtol=0.05)  # what the fixed variance lacks, bounded above


def ddim_error_bound(num_steps):
    """Of the relative error of the spread.

    With y = x / sqrt(abar) and s = sqrt(1 / abar - 1), DDIM is Euler's method for dy/ds = eps_hat, whose solution here is
    y - MEAN ~ f(s) = sqrt(SPREAD^2 + s^2). A step from s to s' has the remainder (s - s')^2 f''/2, f'' = SPREAD^2 / f^3, whose
    largest value on it is at s'; later steps shrink it at most as f does, so the relative errors add up.
    """
    abar = LINEAR.alphas_cumprod[even_steps(1000, num_steps)]
    s = np.append(0, np.sqrt(1 / abar - 1))
    return np.sum(np.diff(s) ** 2 / 2 * SPREAD**2 / (SPREAD**2 + s[:-1] ** 2) ** 2)


def test_ddim_converges_to_the_data():
    diffusion = GaussianDiffusion(LINEAR, "fixed_small")
    start = [m[-1] for m in moments(LINEAR)]
    errors = []
    for num_steps in (100, 250, 1000):
        mean, total, _ = sampled_moments(perfect_eps, diffusion, *start, num_steps, sampler="ddim", eta=0.0)
        np.testing.assert_allclose(mean, MEAN, rtol=1e-8)
        errors.append(abs(np.sqrt(total) / SPREAD - 1))
        assert errors[-1] < ddim_error_bound(num_steps)
    assert errors[0] > errors[1] > errors[2]
    assert ddim_error_bound(1000) < 0.02


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_single_image_is_reproduced_in_any_number_of_steps(settings, num_steps):
    abar = jnp.asarray(LINEAR.alphas_cumprod)
    image = jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)

    def denoise(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        return (x - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)

    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    noise = lambda k: jax.random.normal(jax.random.fold_in(jax.random.key(1), k), x.shape)  # noqa: E731
    out = sample(denoise, x, GaussianDiffusion(LINEAR, "fixed_small"), noise, num_steps=num_steps, **settings)
    np.testing.assert_allclose(out, jnp.broadcast_to(image, x.shape), atol=1e-9)


@pytest.mark.parametrize("schedule", [("const", 30), ("linear", 1000, 0, 0.1)], ids=str)
def test_steps_without_signal_do_not_end_in_nan(schedule):
    """abar falls to 5e-15 and 3e-23: several of the first steps are as good as pure noise, but still a distance apart."""
    schedule = make_schedule(*schedule)
    abar, image = jnp.asarray(schedule.alphas_cumprod), jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)

    def denoise(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        return (x - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)

    x = jax.random.normal(jax.random.key(0), image.shape)
    diffusion = GaussianDiffusion(schedule, "fixed_small")
    out = sample(denoise, x, diffusion, jnp.zeros_like, sampler="dpm++", num_steps=20, clip=True)
    np.testing.assert_allclose(out, image, atol=1e-6)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    diffusion, x = GaussianDiffusion(LINEAR, "fixed_small"), jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    noise = lambda k: jax.random.normal(jax.random.fold_in(jax.random.key(1), k), x.shape)  # noqa: E731
    ddim = sample(perfect_eps, x, diffusion, noise, sampler="ddim", num_steps=20, eta=1.0)
    np.testing.assert_allclose(ddim, sample(perfect_eps, x, diffusion, noise, sampler="ddpm", num_steps=20), atol=1e-9)


@pytest.mark.parametrize(
    "settings", [s for s in SETTINGS if s["sampler"] == "ddpm" or "eta" in s] + [{"sampler": "ddim", "eta": 0.3}], ids=str
)
def test_every_step_but_the_last_adds_noise(settings):
    diffusion = GaussianDiffusion(LINEAR, "fixed_large" if settings["sampler"] == "ddpm" else "fixed_small")
    _, _, of_steps = sampled_moments(perfect_eps, diffusion, 0.0, 1.0, 10, **settings)
    assert of_steps[0] == 0
    assert (of_steps[1:] > 0).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_without_eta_nothing_asks_for_noise(sampler):
    def no_noise(k):
        raise AssertionError("asked for noise")

    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    outs = [
        sample(perfect_eps, x, GaussianDiffusion(LINEAR, "fixed_small"), no_noise, sampler=sampler, num_steps=20) for _ in "ab"
    ]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_the_step_numbers_of_training(sampler):
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return jnp.concatenate([perfect_eps(x, t), jnp.zeros_like(x)], axis=-1)

    x = jnp.zeros((3, 1, 1, 1))
    sample(denoise, x, GaussianDiffusion(LINEAR), lambda k: x, sampler=sampler, num_steps=5).block_until_ready()
    jax.effects_barrier()
    assert seen == [[t] * 3 for t in (999, 749, 500, 250, 0)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_keeps_pixels_in_range(sampler):
    diffusion, x = GaussianDiffusion(LINEAR, "fixed_small"), jnp.full((2, 2, 2, 1), 0.5)
    run = lambda clip: sample(lambda x, t: -x, x, diffusion, lambda k: x, sampler=sampler, num_steps=10, clip=clip)  # noqa: E731
    assert jnp.abs(run(False)).max() > 1
    np.testing.assert_allclose(run(True), 1, atol=1e-12)


def test_clipping_keeps_ddim_on_its_line():
    """A network that overshoots the image by two is clipped back to it, and the noise it stands for is corrected along."""
    abar, image = jnp.asarray(LINEAR.alphas_cumprod), jnp.array([-1.0, 1.0]).reshape(1, 1, 2, 1)
    start, seen = jax.random.normal(jax.random.key(0), (1, 1, 2, 1)), []

    def noise_in(x, t, image):
        a = abar[t].reshape(-1, 1, 1, 1)
        return (x - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)

    def denoise(x, t):
        jax.debug.callback(seen.append, noise_in(x, t, image))
        return noise_in(x, t, 2 * image)

    x = jnp.sqrt(abar[-1]) * image + LINEAR.sigmas[-1] * start
    diffusion = GaussianDiffusion(LINEAR, "fixed_small")
    out = sample(denoise, x, diffusion, jnp.zeros_like, sampler="ddim", num_steps=10, clip=True)
    jax.effects_barrier()
    np.testing.assert_allclose(out, image, atol=1e-12)
    np.testing.assert_allclose(seen, [start] * 10, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_dtype_of_the_noise(sampler):
    x = jnp.zeros((2, 2, 2, 1), jnp.float32)
    out = sample(lambda x, t: x, x, GaussianDiffusion(LINEAR, "fixed_small"), lambda k: x, sampler=sampler, num_steps=3, eta=0.5)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1, 2, 10, 100, 999, 1000])
def test_steps_rise_between_the_ends_of_training(name, count):
    steps = spaced_steps(make_schedule(name, 1000), "logsnr", count)
    assert len(steps) == count and steps[-1] == 999
    assert (np.diff(steps) > 0).all()
    assert count == 1 or steps[0] == 0


def test_steps_are_even_in_log_snr_as_far_as_training_has_them():
    levels = np.log(1 / (1 / LINEAR.alphas_cumprod - 1)) / 2
    steps = spaced_steps(LINEAR, "logsnr", 10)
    # Half the distance between the steps of training, which is largest where there is least noise.
    nearest = np.maximum(np.append(0, -np.diff(levels)), np.append(-np.diff(levels), 0))[steps] / 2
    wanted = np.linspace(levels[0], levels[-1], 10)
    assert (np.abs(levels[steps] - wanted) <= nearest + 1e-9).all()
    np.testing.assert_array_equal(spaced_steps(LINEAR, "even", 10), even_steps(1000, 10))


def test_steps_are_not_spent_on_pure_noise():
    """The cosine schedule ends at lambda = -9.9; of ten steps even down to there, five would see no signal."""
    cosine = make_schedule("squaredcos_cap_v2", 1000)
    seen = cosine.alphas_cumprod[spaced_steps(cosine, "logsnr", 10)]
    assert (np.log(seen) / 2 > -5.1).sum() == 9


def test_fewer_errors_of_the_same_number_of_steps():
    """Even in log-SNR, 2M takes Gaussian data to their spread within a tenth of the error of steps even in t."""
    diffusion, start = GaussianDiffusion(LINEAR, "fixed_small"), [m[-1] for m in moments(LINEAR)]
    errors = {}
    for spacing in ("even", "logsnr"):
        _, total, _ = sampled_moments(perfect_eps, diffusion, *start, 20, sampler="dpm++", spacing=spacing)
        errors[spacing] = abs(np.sqrt(total) / SPREAD - 1)
    assert errors["logsnr"] < errors["even"] / 10


def test_unknown_sampler():
    with pytest.raises(UserError, match=r"sampler 'euler'.*ddpm, ddim, dpm\+\+"):
        sample(perfect_eps, jnp.zeros((1, 1, 1, 1)), GaussianDiffusion(LINEAR), jnp.zeros_like, sampler="euler", num_steps=5)


def test_unknown_spacing():
    with pytest.raises(UserError, match=r"spacing 'karras'.*even, logsnr"):
        spaced_steps(LINEAR, "karras", 5)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_number_of_steps(num_steps):
    with pytest.raises(UserError, match=f"{num_steps} sampling steps"):
        sample(
            perfect_eps, jnp.zeros((1, 1, 1, 1)), GaussianDiffusion(LINEAR), jnp.zeros_like, sampler="ddim", num_steps=num_steps
        )
