"""Schedules against their closed forms and Bayes' rule, in float64."""

import math

import numpy as np
import pytest

from speedit_jax.diffusion.schedules import SCHEDULES, Schedule, even_steps, make_schedule, respace, sampling_steps
from speedit_jax.errors import UserError

EXACT = {"rtol": 1e-12, "atol": 0}  # float64 with a few thousand roundings


@pytest.mark.parametrize("num_steps", [25, 250, 1000, 4000])
def test_linear_betas_are_evenly_spaced_between_scaled_ends(num_steps):
    betas = make_schedule("linear", num_steps).betas
    assert len(betas) == num_steps
    np.testing.assert_allclose(betas[[0, -1]] * num_steps, [0.1, 20.0], **EXACT)
    np.testing.assert_allclose(np.diff(betas), 19.9 / num_steps / (num_steps - 1), rtol=1e-9)


def test_linear_of_1000_steps_is_that_of_ddpm():
    schedule = make_schedule("linear", 1000)
    assert schedule.betas[0] == 1e-4
    assert schedule.betas[-1] == 0.02
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 4.035829765375676e-05, rtol=1e-10)


def test_quad_betas_have_evenly_spaced_roots():
    for num_steps in (25, 250, 1000):
        roots = np.sqrt(make_schedule("quad", num_steps).betas * num_steps / 1000)
        np.testing.assert_allclose(roots[[0, -1]], [0.01, math.sqrt(0.02)], **EXACT)
        np.testing.assert_allclose(np.diff(roots), (math.sqrt(0.02) - 0.01) / (num_steps - 1), rtol=1e-9)


def test_const_decays_geometrically():
    np.testing.assert_allclose(make_schedule("const", 1000).alphas_cumprod, 0.98 ** np.arange(1, 1001), rtol=1e-10)
    np.testing.assert_allclose(make_schedule("const", 250).alphas_cumprod, 0.92 ** np.arange(1, 251), rtol=1e-10)


def test_cosine_is_another_name():
    np.testing.assert_array_equal(make_schedule("cosine", 100).betas, make_schedule("squaredcos_cap_v2", 100).betas)


@pytest.mark.parametrize("num_steps", [2, 100, 1000])
def test_squaredcos_telescopes_to_the_cosine_until_its_cap(num_steps):
    schedule = make_schedule("squaredcos_cap_v2", num_steps)
    u = (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * math.pi / 2
    abar = np.cos(u) ** 2 / math.cos(u[0]) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], abar[1:-1], rtol=1e-10)
    assert schedule.betas[-1] == 0.999  # the cosine ends at abar = 0, that is at beta = 1
    assert schedule.betas[:-1].max() < 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_of_every_schedule(name):
    schedule = make_schedule(name, 1000)
    abar = [math.prod(1 - schedule.betas[: t + 1]) for t in range(0, 1000, 111)]
    np.testing.assert_allclose(schedule.alphas_cumprod[::111], abar, **EXACT)
    assert schedule.alphas_cumprod_prev[0] == 1
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1])
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    np.testing.assert_allclose(schedule.sigmas**2 + schedule.alphas_cumprod, 1, **EXACT)
    np.testing.assert_array_equal(schedule.model_steps, np.arange(1000))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chain_of_one_step_kernels_has_the_closed_form_marginal(name):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, composed step by step, is eq. (3)."""
    schedule = make_schedule(name, 200)
    scale, variance = 1.0, 0.0
    for beta, abar, sigma in zip(schedule.betas, schedule.alphas_cumprod, schedule.sigmas, strict=True):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        np.testing.assert_allclose([scale, math.sqrt(variance)], [math.sqrt(abar), sigma], rtol=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name):
    """The product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0), as functions of x_{t-1}."""
    schedule = make_schedule(name, 100)
    for t in range(1, 100):
        beta, abar_prev = schedule.betas[t], np.prod(1 - schedule.betas[:t])
        precision = (1 - beta) / beta + 1 / (1 - abar_prev)
        expected = [1 / precision, math.sqrt(abar_prev) / (1 - abar_prev) / precision, math.sqrt(1 - beta) / beta / precision]
        got = [schedule.posterior_variance[t], schedule.posterior_mean_coef_x0[t], schedule.posterior_mean_coef_xt[t]]
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        np.testing.assert_allclose(schedule.posterior_log_variance_clipped[t], math.log(expected[0]), rtol=1e-9)
    # Before the first step there is x_0 itself, without noise.
    assert schedule.posterior_variance[0] == 0
    np.testing.assert_allclose([schedule.posterior_mean_coef_x0[0], schedule.posterior_mean_coef_xt[0]], [1, 0], rtol=1e-12)
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [[999], [0, 999], [3, 14, 159, 265], range(0, 1000, 20), range(1000)])
def test_respacing_keeps_abar_and_the_original_step_numbers(name, steps):
    original = make_schedule(name, 1000)
    respaced = respace(original, steps)
    # 1 - beta is exact to 1e-16, whatever is left of abar.
    np.testing.assert_allclose(respaced.alphas_cumprod, original.alphas_cumprod[np.array(steps)], rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(respaced.model_steps, steps)
    assert name in respaced.name


def test_respacing_twice_still_tells_the_first_step_numbers():
    once = respace(make_schedule("linear", 1000), range(0, 1000, 10))
    np.testing.assert_array_equal(respace(once, [0, 50, 99]).model_steps, [0, 500, 990])


@pytest.mark.parametrize("steps", [[], [-1, 3], [0, 10], [3, 3], [4, 2]])
def test_respacing_to_impossible_steps(steps):
    with pytest.raises(ValueError, match=r"0\.\.9"):
        respace(make_schedule("squaredcos_cap_v2", 10), steps)


@pytest.mark.parametrize("num_steps, count", [(1000, 2), (1000, 50), (1000, 250), (1000, 999), (1000, 1000), (37, 12), (2, 2)])
def test_even_steps_are_even_and_keep_both_ends(num_steps, count):
    steps = even_steps(num_steps, count)
    assert len(steps) == count
    assert (steps[0], steps[-1]) == (0, num_steps - 1)
    stride = (num_steps - 1) / (count - 1)
    assert np.abs(steps - stride * np.arange(count)).max() <= 0.5 + 1e-9
    assert (np.diff(steps) >= 1).all()


def test_one_even_step_is_the_noisiest():
    np.testing.assert_array_equal(even_steps(1000, 1), [999])


@pytest.mark.parametrize("count", [0, -3, 1001])
def test_even_steps_refuses_what_the_schedule_does_not_have(count):
    with pytest.raises(UserError, match=rf"^{count} sampling steps.*1\.\.1000"):
        even_steps(1000, count)


@pytest.mark.parametrize("spec", [50, "50", " 50", (50,), [50]])
def test_a_number_of_steps_is_spaced_evenly(spec):
    np.testing.assert_array_equal(sampling_steps(1000, spec), even_steps(1000, 50))


def test_strides():
    np.testing.assert_array_equal(sampling_steps(1000, "ddim50"), np.arange(0, 1000, 20))
    np.testing.assert_array_equal(sampling_steps(10, "ddim4"), [0, 3, 6, 9])


@pytest.mark.parametrize("spec", ["10,15,20", (10, 15, 20), [10, 15, 20], " 10, 15, 20"])
def test_sections_are_even_and_keep_both_their_ends(spec):
    steps = sampling_steps(300, spec)
    np.testing.assert_array_equal(np.bincount(steps // 100), [10, 15, 20])
    np.testing.assert_array_equal(steps[[0, 9, 10, 24, 25, 44]], [0, 99, 100, 199, 200, 299])
    assert np.diff(steps[:10]).tolist() == [11] * 9
    assert set(np.diff(steps[10:25]).tolist()) == {7, 8} and set(np.diff(steps[25:]).tolist()) == {5, 6}


def test_sections_of_unequal_sizes():
    # 11 = 4 + 4 + 3; one step of a section is its first.
    np.testing.assert_array_equal(sampling_steps(11, "1,4,2"), [0, 4, 5, 6, 7, 8, 10])


@pytest.mark.parametrize(
    "spec, message",
    [
        (0, "^0 sampling steps"),
        ("-3", "^-3 sampling steps"),
        ("1001", "^1001 sampling steps"),
        ("ddim300", "ddim300: no stride gives exactly 300 of 1000 steps; use num_steps=300"),
        ("ddim1", "ddim1: no stride"),
        ("ddim", "'ddim' is not a valid number of sampling steps; use 50, ddim50, trailing50, or 10,15,20"),
        ("fast", "'fast' is not a valid number"),
        ("10,,5", "not a valid number"),
        ("10,0,5", "not a valid number"),
        (7.5, "'7.5' is not a valid number"),
        (True, "'True' is not a valid number"),
        ("501,10", "501,10: 501 sampling steps asked of a section of 500"),
    ],
)
def test_sampling_steps_that_are_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        sampling_steps(1000, spec)


@pytest.mark.parametrize(
    "name, num_steps, message",
    [
        ("cos", 1000, r"diffusion\.schedule 'cos'.*linear, squaredcos_cap_v2, cosine, quad, const"),
        ("linear", 1, r"diffusion\.num_steps=1\b"),
        ("squaredcos_cap_v2", 0, r"diffusion\.num_steps=0\b"),
        ("linear", 10, r"diffusion\.schedule='linear' with diffusion\.num_steps=10 has a beta of 2\b"),
        ("const", 20, r"diffusion\.num_steps=20 has a beta of 1\b"),
        ("quad", 15, r"diffusion\.num_steps=15 has a beta of 1\.33\b"),
        ("linear", 20, r"diffusion\.num_steps=20 has a beta of 1\b"),
    ],
)
def test_user_errors_name_the_key(name, num_steps, message):
    with pytest.raises(UserError, match=message):
        make_schedule(name, num_steps)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.1], [-0.1, 0.1], [[0.1]], [np.nan]])
def test_a_schedule_is_a_row_of_probabilities(betas):
    with pytest.raises(ValueError, match="'mine'"):
        Schedule("mine", np.array(betas), np.arange(len(betas)))


@pytest.mark.parametrize("steps", [[20], [0, 20], [19, 20]], ids=str)
def test_a_large_step_keeps_some_signal(steps):
    """abar ends at 2e-28, and 1 - 2e-28 is 1: with abar = 0 a prediction of the noise would say nothing of the image."""
    kept = respace(make_schedule("const", 21), steps).alphas_cumprod
    assert 0 < kept[-1] < 1e-15
    np.testing.assert_allclose(kept[:-1], make_schedule("const", 21).alphas_cumprod[steps[:-1]], rtol=1e-12, atol=1e-15)


def test_given_ends():
    linear, quad = (make_schedule(name, 500, 0.00085, 0.012).betas for name in ("linear", "quad"))
    for betas, line in ((linear, linear), (quad, np.sqrt(quad))):
        np.testing.assert_allclose(betas[[0, -1]], (0.00085, 0.012), rtol=1e-12)
        np.testing.assert_allclose(np.diff(line), np.diff(line)[0], rtol=1e-9)
    np.testing.assert_array_equal(make_schedule("quad", 250, 0.0, 0.0).betas, make_schedule("quad", 250).betas)
    with pytest.raises(UserError, match=r"diffusion\.beta_end=0\.012: diffusion\.schedule='cosine' has none"):
        make_schedule("cosine", 500, 0.0, 0.012)
    with pytest.raises(UserError, match=r"diffusion\.beta_start=-1: must lie in"):
        make_schedule("linear", 500, -1, 0.012)
    with pytest.raises(UserError, match=r"beta_end=0\.5: abar falls to 5e-134 over 1000 steps"):
        make_schedule("linear", 1000, 0.0, 0.5)


def test_two_signs_are_no_number_of_steps():
    with pytest.raises(UserError, match="'--5' is not a valid number of sampling steps"):
        sampling_steps(1000, "--5")


@pytest.mark.parametrize("count", [1, 7, 50, 999, 1000])
def test_trailing_steps_end_at_the_last(count):
    steps = sampling_steps(1000, f"trailing{count}")
    assert len(steps) == count and steps[-1] == 999
    assert (np.diff(steps) > 0).all() and steps[0] >= 0
    np.testing.assert_allclose(np.diff(steps), 1000 / count, atol=1)
