"""Inpainting with the perfect network of Gaussian images N(0, C), for which every sampler is a linear map plus noise.

`law` propagates mean and covariance in float64 by single steps, written from the equations of DDPM, DDIM, RePaint and DDNM; the
samplers must draw from it.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_samplers import FLOW_SAMPLERS, sample_flow
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.inverse import Known, Plan, travel_times
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace

LINEAR = make_schedule("linear", 1000)


def autoregressive(size, correlation):
    return correlation ** np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prior N(0, C), which pixels are known, and their values."""

    covariance: np.ndarray
    known: np.ndarray
    y: np.ndarray

    def posterior(self):
        """(mean, covariance) of the unknown pixels."""
        k, c = self.known, self.covariance
        gain = c[~k][:, k] @ np.linalg.inv(c[k][:, k])
        return gain @ self.y[k], c[~k][:, ~k] - gain @ c[k][:, ~k]


COSINE = np.sqrt(0.5) * np.cos(np.arange(16))
PROBLEMS = {
    "pair": Problem(autoregressive(2, 0.8), np.array([True, False]), np.array([1.0, 0.0])),
    "half": Problem(autoregressive(16, 0.9), np.arange(16) < 8, COSINE),
    "every second": Problem(autoregressive(16, 0.9), np.arange(16) % 2 == 0, COSINE),
    "six": Problem(autoregressive(6, 0.9), np.array([1, 0, 1, 0, 0, 1], bool), np.array([0.5, 0, -0.3, 0, 0, 1])),
    "independent": Problem(np.eye(2), np.array([True, False]), np.array([1.0, 0.0])),
}
REPLACEMENT, REPAINT = {"method": "repaint"}, {"method": "repaint", "resample": 10, "jump": 10}


def law(problem, num_steps, method="projection", eta=None, resample=1, jump=10, start=None, variance="fixed_large"):
    """(mean, covariance) of the unknown pixels that a sampler draws.

    Args:
      eta: of DDIM; None is DDPM with a fixed variance.
      start: how many of the steps are run, from a noised y; None is all, from pure noise.
    """
    schedule = respace(LINEAR, even_steps(1000, num_steps))
    abar, betas = schedule.alphas_cumprod, schedule.betas
    size, c, known = len(problem.y), problem.covariance, np.diag(problem.known.astype(float))
    eye = np.eye(size)
    mean, cov = np.zeros(size), np.eye(size)
    if start:
        mean, cov = np.sqrt(abar[start - 1]) * problem.y, (1 - abar[start - 1]) * eye

    def move(matrix, offset, noise):
        nonlocal mean, cov
        mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + noise

    def inject(level):
        if method == "repaint":
            signal = abar[level] if level >= 0 else 1.0
            move(eye - known, np.sqrt(signal) * known @ problem.y, (1 - signal) * known)

    times = travel_times(start or num_steps, jump, resample)
    inject(times[0])
    for t, after in itertools.pairwise(times):
        if after > t:
            move(np.sqrt(1 - betas[after]) * eye, 0, betas[after] * eye)
            inject(after)
            continue
        alpha, sigma, signal = np.sqrt(abar[t]), np.sqrt(1 - abar[t]), abar[after] if after >= 0 else 1.0
        denoise = alpha * c @ np.linalg.inv(abar[t] * c + (1 - abar[t]) * eye)
        eps = (eye - alpha * denoise) / sigma
        btilde = betas[t] * (1 - signal) / (1 - abar[t])
        if eta is None:
            s = np.sqrt(betas[t] if variance == "fixed_large" else btilde) * (after >= 0)
            # The posterior's mean, as it is where s^2 is btilde: DDPM keeps it for any variance.
            matrix = np.sqrt(signal) * denoise + np.sqrt(max(1 - signal - btilde, 0)) * eps
        else:
            s = eta * np.sqrt(btilde)
            matrix = np.sqrt(signal) * denoise + np.sqrt(max(1 - signal - s**2, 0)) * eps
        offset = np.zeros(size)
        if method == "projection":
            matrix, offset = matrix - np.sqrt(signal) * known @ denoise, np.sqrt(signal) * known @ problem.y
        move(matrix, offset, s**2 * eye)
        inject(after)
    unknown = ~problem.known
    return mean[unknown], cov[unknown][:, unknown]


@pytest.mark.parametrize(
    "name, settings, num_steps, of_mean, of_covariance",
    [
        ("pair", REPLACEMENT, 250, 0.304, 0.39),
        ("pair", REPAINT, 250, 0.036, 0.047),
        ("pair", {"eta": 0.0}, 50, 0.084, 0.000),
        ("pair", {"eta": 0.0}, 250, 0.032, 0.003),
        ("pair", {"eta": 1.0}, 50, 0.066, 0.094),
        ("pair", {"eta": 1.0}, 250, 0.014, 0.029),
        ("half", REPLACEMENT, 250, 0.645, 0.35),
        ("half", REPAINT, 250, 0.198, 0.078),
        ("half", {"eta": 0.0}, 50, 0.361, 0.118),
        ("half", {"eta": 0.0}, 250, 0.138, 0.050),
        ("half", {"eta": 0.0, "resample": 5, "jump": 5}, 50, 0.096, 0.044),
        ("half", {"eta": 0.0, "resample": 5, "jump": 5}, 250, 0.004, 0.010),
        ("every second", REPAINT, 50, 0.273, 0.63),
        ("every second", REPAINT, 250, 0.066, 0.076),
        ("every second", {"eta": 0.0}, 50, 0.061, 0.093),
        ("every second", {"eta": 0.0}, 250, 0.026, 0.020),
    ],
)
def test_how_far_each_method_is_from_the_posterior(name, settings, num_steps, of_mean, of_covariance):
    """docs/inpainting.md says these numbers."""
    problem = PROBLEMS[name]
    mean, covariance = law(problem, num_steps, **settings)
    true_mean, true_covariance = problem.posterior()
    np.testing.assert_allclose(np.linalg.norm(mean - true_mean), of_mean, atol=2e-3)
    error = np.linalg.norm(covariance - true_covariance) / np.linalg.norm(true_covariance)
    np.testing.assert_allclose(error, of_covariance, atol=5e-3 if of_covariance >= 0.3 else 2e-3)


@pytest.mark.parametrize("method", ["projection", "repaint"])
@pytest.mark.parametrize(
    "settings, num_steps, variance",
    [
        ({"variance": "fixed_large"}, 250, 0.9999),
        ({"variance": "fixed_small"}, 50, 0.855),
        ({"variance": "fixed_small"}, 250, 0.966),
        ({"eta": 0.0}, 50, 0.928),
        ({"eta": 0.0}, 250, 0.985),
    ],
    ids=str,
)
def test_pixels_that_know_nothing_of_the_known_ones_keep_the_samplers_own_variance(method, settings, num_steps, variance):
    mean, covariance = law(PROBLEMS["independent"], num_steps, method, **settings)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(covariance, variance, atol=1e-3)


def drawn(problem, plan, num_steps, run):
    """(mean, covariance) of what a sampler draws, exactly: it is affine in each of its noises.

    Image 0 has no noise at all, each other one a unit of noise in one pixel of one draw.

    Args:
      run: (x, noise, known) -> images, all [B, 1, size, 1].
    """
    size = len(problem.y)
    rows = len(plan.rows(np.linspace(0.9, 0.1, num_steps), np.linspace(0.1, 0.9, num_steps))["level"])
    images = jnp.arange(1 + size + 3 * rows * size)[:, None]

    def noise(number):
        kind, number = number // 2**29, number % 2**29  # of the step, of a time travel, of a replacement
        return (images == 1 + size + (kind * rows + number) * size + jnp.arange(size)).astype(float)[:, None, :, None]

    x = (images == 1 + jnp.arange(size)).astype(float)[:, None, :, None]
    y = jnp.broadcast_to(problem.y[:, None], x.shape)
    known = Known(y, jnp.broadcast_to(problem.known[:, None], x.shape), plan)
    out = np.asarray(run(x, noise, known))[:, 0, :, 0]
    np.testing.assert_array_equal(
        out[:, problem.known], np.broadcast_to(problem.y[problem.known], (len(out), problem.known.sum()))
    )
    out = out[:, ~problem.known]
    return out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])


def perfect_eps(covariance):
    abar = LINEAR.alphas_cumprod[:, None, None]
    table = np.sqrt(1 - abar) * np.linalg.inv(abar * covariance + (1 - abar) * np.eye(len(covariance)))

    def denoise(x, t):
        return jnp.einsum("ij,bhjc->bhic", jnp.asarray(table, x.dtype)[t[0]], x)

    return denoise


@pytest.mark.parametrize(
    "plan, settings",
    [
        (Plan(), {"eta": 0.0}),
        (Plan(), {"eta": 1.0}),
        (Plan(), {"eta": None}),
        (Plan(), {"eta": None, "variance": "fixed_small"}),
        (Plan(resample=3, jump=2), {"eta": 0.5}),
        (Plan(strength=0.6), {"eta": 1.0}),
        (Plan(strength=0.6, resample=2, jump=3), {"eta": None}),
        (Plan("repaint"), {"eta": None}),
        (Plan("repaint", resample=3, jump=2), {"eta": None}),
        (Plan("repaint", strength=0.6, resample=2, jump=1), {"eta": 0.0}),
    ],
    ids=str,
)
def test_samplers_draw_from_the_law(plan, settings):
    """To 1e-9: a jump of several levels is one draw here and many in `law`, and has the same law."""
    problem = PROBLEMS["six"]
    variance = settings.get("variance", "fixed_large")
    sampler = {"sampler": "ddpm"} if settings["eta"] is None else {"sampler": "ddim", "eta": settings["eta"]}
    with jax.enable_x64(True):
        diffusion = GaussianDiffusion(LINEAR, variance)

        def run(x, noise, known):
            return sample(perfect_eps(problem.covariance), x, diffusion, noise, num_steps=10, known=known, **sampler)

        found = drawn(problem, plan, 10, run)
    start = None if plan.strength == 1 else round(10 * plan.strength)
    wanted = law(problem, 10, plan.method, settings["eta"], plan.resample, plan.jump, start, variance)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def dpm_law(problem, num_steps, eta):
    """`law` of DPM-Solver++(2M) by projection; its state is x and the x0_hat of the step before."""
    schedule = respace(LINEAR, even_steps(1000, num_steps))
    size, c, known = len(problem.y), problem.covariance, np.diag(problem.known.astype(float))
    eye, zero = np.eye(size), np.zeros((size, size))
    abar = schedule.alphas_cumprod
    half_log_snr = np.log(abar / (1 - abar)) / 2
    mean, cov = np.zeros(2 * size), np.block([[eye, zero], [zero, zero]])
    for t in range(num_steps)[::-1]:
        alpha, sigma = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        to_alpha, to_sigma = (np.sqrt(abar[t - 1]), np.sqrt(1 - abar[t - 1])) if t else (1.0, 0.0)
        s = eta * to_sigma / sigma * np.sqrt(1 - alpha**2 / to_alpha**2)
        a = np.sqrt(max(to_sigma**2 - s**2, 0)) / sigma
        b = to_alpha - alpha * a
        steps = [half_log_snr[t + i - 1] - half_log_snr[t + i] for i in (0, 1)] if 0 < t < num_steps - 1 else [0, 1]
        r = steps[0] / (2 * steps[1])
        denoise = alpha * c @ np.linalg.inv(abar[t] * c + (1 - abar[t]) * eye)
        now = a * eye + b * (1 + r) * denoise - to_alpha * known @ denoise
        matrix = np.block([[now, -b * r * eye], [denoise, zero]])
        mean = matrix @ mean + np.concatenate([to_alpha * known @ problem.y, np.zeros(size)])
        cov = matrix @ cov @ matrix.T + np.block([[s**2 * eye, zero], [zero, zero]])
    unknown = np.flatnonzero(~problem.known)
    return mean[unknown], cov[np.ix_(unknown, unknown)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_draws_from_its_law(eta):
    problem = PROBLEMS["six"]
    with jax.enable_x64(True):
        diffusion = GaussianDiffusion(LINEAR, "fixed_small")

        def run(x, noise, known):
            settings = {"sampler": "dpm++", "eta": eta, "num_steps": 8}
            return sample(perfect_eps(problem.covariance), x, diffusion, noise, known=known, **settings)

        found = drawn(problem, Plan(), 8, run)
    for ours, theirs in zip(found, dpm_law(problem, 8, eta), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_dpm_solver_does_not_extrapolate_over_a_time_travel():
    """Of a single image each x0_hat is right, so extrapolation changes nothing; of others a step back would."""
    problem = PROBLEMS["six"]
    with jax.enable_x64(True):
        diffusion = GaussianDiffusion(LINEAR, "fixed_small")

        def run(sampler):
            def go(x, noise, known):
                return sample(perfect_eps(problem.covariance), x, diffusion, noise, known=known, sampler=sampler, num_steps=3)

            return go

        # Levels 2, 1, 0, 1, 0: only the step from 1 has a step before it that it could extrapolate from, and comes twice.
        plan = Plan(resample=2, jump=1)
        dpm, ddim = (drawn(problem, plan, 3, run(sampler)) for sampler in ("dpm++", "ddim"))
    assert travel_times(3, 1, 2) == [2, 1, 2, 1, 0, 1, 0, -1]
    assert abs(dpm[0] - ddim[0]).max() > 1e-3


def gvp(s):
    angle = np.pi * s / 2
    return np.sin(angle), np.cos(angle), np.pi / 2 * np.cos(angle), -np.pi / 2 * np.sin(angle)


def flow_law(problem, path, sampler, times):
    """`law` of a flow by projection."""
    size, c, known = len(problem.y), problem.covariance, np.diag(problem.known.astype(float))
    eye = np.eye(size)
    coefficients = gvp if path == "gvp" else lambda s: (s, 1 - s, 1.0, -1.0)
    mean, cov = np.zeros(size), eye

    def velocity(s):
        alpha, sigma, d_alpha, d_sigma = coefficients(s)
        inverse = np.linalg.inv(alpha**2 * c + sigma**2 * eye)
        return d_alpha * alpha * c @ inverse + d_sigma * sigma * inverse, sigma * inverse

    for s, after in itertools.pairwise(times):
        h, to_alpha = after - s, coefficients(after)[0]
        alpha, sigma, d_alpha, d_sigma = coefficients(s)
        forced = to_alpha * known @ problem.y
        slope, eps = velocity(s)
        slope_offset, noise = np.zeros(size), 0.0
        of_slope = slope  # from which x0_hat follows
        if sampler == "heun":
            denoise = (d_sigma * eye - sigma * slope) / (alpha * d_sigma - sigma * d_alpha)
            ahead, _ = velocity(after)
            slope_offset = ahead @ forced / 2
            slope = of_slope = (slope + ahead @ (eye + h * slope - to_alpha * known @ denoise)) / 2
        if sampler == "sde":
            slope = slope - eps
            noise = 2 * h * sigma if after < 1 else 0.0
        denominator = alpha * d_sigma - sigma * d_alpha
        x0, x0_offset = (d_sigma * eye - sigma * of_slope) / denominator, -sigma * slope_offset / denominator
        matrix = eye + h * slope - to_alpha * known @ x0
        mean = matrix @ mean + h * slope_offset + forced - to_alpha * known @ x0_offset
        cov = matrix @ cov @ matrix.T + noise * eye
    unknown = ~problem.known
    return mean[unknown], cov[unknown][:, unknown]


def perfect_velocity(flow, covariance):
    eye = jnp.eye(len(covariance))

    def denoise(x, s):
        alpha, sigma, d_alpha, d_sigma = (v.squeeze() for v in flow.coefficients(s[:1], x))
        inverse = jnp.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        matrix = d_alpha * alpha * covariance @ inverse + d_sigma * sigma * inverse
        return jnp.einsum("ij,bhjc->bhic", matrix, x)

    return denoise


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_flows_draw_from_the_law(path, sampler):
    problem = PROBLEMS["six"]
    times = np.linspace(0, 1, 9) if sampler != "sde" else np.append(np.linspace(0, 1 - 1 / 8, 8), 1)
    with jax.enable_x64(True):
        flow = FlowMatching(path)

        def run(x, noise, known):
            return sample_flow(
                perfect_velocity(flow, problem.covariance), x, flow, noise, sampler=sampler, num_steps=8, known=known
            )

        found = drawn(problem, Plan(), 8, run)
    for ours, theirs in zip(found, flow_law(problem, path, sampler, times), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_flows_come_near_the_posterior_slowly(path):
    """docs/inpainting.md says how slowly: the error of the mean falls by about N^(-1/3)."""
    problem = PROBLEMS["pair"]
    errors = []
    for num_steps in (25, 200, 1600):
        mean, _ = flow_law(problem, path, "euler", np.linspace(0, 1, num_steps + 1))
        errors.append(abs(mean - problem.posterior()[0])[0])
    assert errors[0] / 2.5 < errors[1] < errors[0] / 1.8 and errors[1] / 2.5 < errors[2] < errors[1] / 1.8 and errors[2] < 0.05
