"""Guidance: its formula, its schedules and its interval, and which passes of the network it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import GUIDANCE_SCHEDULES, guidance_scales, guided, sample
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.errors import UserError

LINEAR = make_schedule("linear", 1000)
NULL = 10
X = np.random.default_rng(0).standard_normal((3, 2, 2, 4))
STEPS = jnp.array([5, 6, 7])
LABELS = jnp.array([1, 2, 3])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def network(shapes):
    """A stand-in that depends on every input, and notes the shape of each call; 8 output channels."""

    def model(x, t, y):
        shapes.append(x.shape)
        return jnp.concatenate([x, x**2], axis=-1) + (0.1 * jnp.float64(t) + jnp.float64(y) ** 2)[:, None, None, None]

    return model


def test_a_scale_of_1_runs_the_plain_model_once():
    shapes = []
    out = guided(network(shapes), LABELS, NULL, 1.0, 4)(X, STEPS)
    assert shapes == [X.shape]
    np.testing.assert_array_equal(out, network([])(X, STEPS, LABELS))


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_is_its_formula_on_the_guided_channels(scale, channels):
    shapes = []
    out = guided(network(shapes), LABELS, NULL, scale, channels)(X, STEPS)
    assert shapes == [(6, 2, 2, 4)]
    cond = network([])(X, STEPS, LABELS)
    uncond = network([])(X, STEPS, jnp.full(3, NULL))
    np.testing.assert_allclose(out[..., :channels], ((1 - scale) * uncond + scale * cond)[..., :channels], atol=1e-12)
    np.testing.assert_array_equal(out[..., channels:], cond[..., channels:])
    if scale == 0:
        np.testing.assert_array_equal(out[..., :channels], uncond[..., :channels])


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_autoguidance_is_its_formula_on_the_guided_channels(scale):
    weaker = lambda x, t, y: -x + jnp.float64(y)[:, None, None, None]  # noqa: E731
    out = guided(network([]), LABELS, None, scale, 4, weaker)(X, STEPS)
    own, other = network([])(X, STEPS, LABELS), weaker(X, STEPS, LABELS)
    np.testing.assert_allclose(out[..., :4], (1 - scale) * other + scale * own[..., :4], atol=1e-12)
    np.testing.assert_array_equal(out[..., 4:], own[..., 4:])


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_guidance_schedules_have_the_same_mean_and_never_fall_as_noise_does(schedule):
    scales = guidance_scales(1000, 3.0, schedule, 0.0, 1.0)
    np.testing.assert_allclose(scales.mean(), 3.0, rtol=1e-12)
    assert (np.diff(scales) <= 0).all()
    # The middle step between them, which there is none of: half a step is 2 / 1000 for linear.
    np.testing.assert_allclose(scales[[499, 500]].mean(), 3.0, rtol=1e-12)
    if schedule != "constant":
        np.testing.assert_allclose(scales[[0, -1]], [5.0, 1.0], atol=2.1e-3)


def test_the_interval_of_guidance_is_in_fractions_of_training():
    scales = guidance_scales(1000, 3.0, "constant", 0.2, 0.75)
    np.testing.assert_array_equal(scales, np.where((np.arange(1000) >= 200) & (np.arange(1000) < 750), 3.0, 1.0))
    np.testing.assert_array_equal(guidance_scales(1000, 1.25, "constant", 0.0, 1.0), np.full(1000, 1.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sine", 0.0, 1.0), r"guidance_schedule 'sine'; choose one of constant, linear, cosine"),
        (("constant", 0.5, 0.5), r"guidance_low=0.5, guidance_high=0.5: must be 0 <= low < high <= 1"),
        (("constant", 0.8, 0.2), "guidance_low=0.8"),
        (("constant", -0.1, 1.0), "guidance_low=-0.1"),
        (("constant", 0.0, 1.1), "guidance_high=1.1"),
        (("constant", float("nan"), 1.0), "guidance_low=nan"),
    ],
)
def test_impossible_guidance(settings, message):
    with pytest.raises(UserError, match=message):
        guidance_scales(1000, 3.0, *settings)


def counting(runs):
    """`network`, that notes the batch size of each pass when it runs, not when it is compiled."""

    def model(x, t, y):
        jax.debug.callback(lambda: runs.append(len(x)), ordered=True)
        return network([])(x, t, y)

    return model


@pytest.mark.parametrize("autoguidance", [False, True])
def test_steps_outside_the_interval_run_one_pass(autoguidance):
    runs, x = [], jnp.asarray(X)
    guide = counting(runs) if autoguidance else None
    denoise = guided(counting(runs), LABELS, NULL, guidance_scales(1000, 3.0, "constant", 0.2, 0.75), 4, guide)
    sample(denoise, x, GaussianDiffusion(LINEAR), jnp.zeros_like, sampler="ddim", num_steps=5).block_until_ready()
    jax.effects_barrier()
    within = [3, 3] if autoguidance else [6]
    assert runs == [3, *within, *within, *within, 3]


@pytest.mark.parametrize(("low", "high", "inside"), [(0.0, 0.5, [True, False]), (0.5, 1.0, [False, True])])
def test_each_step_has_its_own_scale(low, high, inside):
    """The table's in the interval, and the plain model outside of it."""
    scales = guidance_scales(1000, 3.0, "linear", low, high)
    denoise = jax.jit(guided(network([]), LABELS, NULL, scales, 4))
    for t, within in zip((250, 750), inside, strict=True):
        t = jnp.full(3, t)
        expected = guided(network([]), LABELS, NULL, scales[t[0]] if within else 1.0, 4)(X, t)
        np.testing.assert_allclose(denoise(X, t), expected, rtol=1e-12)


def test_only_an_interval_compiles_two_programs():
    def program(*settings):
        denoise = guided(network([]), LABELS, NULL, guidance_scales(1000, *settings), 4)
        return str(jax.make_jaxpr(denoise)(X, STEPS))

    assert "cond[" in program(3.0, "constant", 0.2, 0.8)
    for settings in ((3.0, "constant", 0.0, 1.0), (3.0, "cosine", 0.0, 1.0), (1.0, "constant", 0.2, 0.8)):
        assert "cond[" not in program(*settings)
