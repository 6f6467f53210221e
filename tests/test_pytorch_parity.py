"""Our numbers against those of the published PyTorch code, recorded by fixtures/make_pytorch_fixtures.py.

Two programs that do the same arithmetic in another order differ by a few roundings: about 1e-7 each in float32 and 1e-16 in
float64, times how much the computation amplifies them. The tolerances below are that with room for other machines.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import guided, sample
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace, sampling_steps
from speedit_jax.diffusion.strategies import LossSecondMomentStrategy
from speedit_jax.diffusion.timesteps import make_strategy
from speedit_jax.interop import dit as names
from speedit_jax.models.build import build
from speedit_jax.models.layers import sincos_position_table

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def load(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def section(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def nhwc(x):
    """PyTorch's layout to ours: [..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(x, -3, -1)


def assert_close(ours, theirs, tolerance):
    """Both the L2 norm of the difference and its maximum, relative to the reference's own."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(theirs)
    assert difference.max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def dit():
    return load("dit")


def build_network(dit):
    """Our model with the PyTorch weights: (model, parameters)."""
    config = get_config().model
    config.name = "DiT-tiny/2"
    config.width, config.depth, config.heads = 32, 2, 4
    model = build(config, image_shape=(8, 8, 4), num_classes=10, learned_variance=True, platform="cpu")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, names.TABLE.from_torch(section(dit, "state/"), shapes, patch=2)


@pytest.fixture(scope="module")
def network(dit):
    return build_network(dit)


def test_position_table(dit):
    # Sines and cosines of at most one, in float64.
    np.testing.assert_allclose(sincos_position_table(4, 4, 32), dit["float64/positions"], rtol=0, atol=1e-15)


def test_forward(dit, network):
    model, params = network
    out = jax.jit(model.apply)(params, nhwc(dit["x"]), dit["t"], dit["y"])
    # Mostly the sinusoid of t = 999, whose angles are rounded to 3e-5 on both sides; the network alone differs by 3e-7.
    assert_close(out, nhwc(dit["out"]), 1e-5)


def test_forward_float64(dit):
    arrays = section(dit, "float64/")
    with jax.enable_x64(True):
        model, params = build_network(dit)
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, nhwc(arrays["x"])))
        out = jax.jit(model.apply)(params, x, jnp.zeros(len(x), int), arrays["y"])
    assert out.dtype == jnp.float64
    assert_close(out, nhwc(arrays["out"]), 1e-12)


def test_gradients(dit, network):
    model, params = network

    def loss(params):
        return (model.apply(params, nhwc(dit["x"]), dit["t"], dit["y"]) * nhwc(dit["cotangent"])).sum()

    ours = jax.jit(jax.grad(loss))(params)
    # A gradient sums over batch and tokens terms that partly cancel: ten times the forward's tolerance.
    theirs = names.TABLE.from_torch(section(dit, "gradient/"), params, patch=2)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), ours, theirs)


def training_losses(arrays, dtype):
    """(per-example losses, gradient of their sum with respect to the network's output)."""
    diffusion = GaussianDiffusion(make_schedule("linear", 1000))
    x0, noise, output = (jnp.asarray(nhwc(arrays[k]), dtype) for k in ("x0", "noise", "output"))
    t = jnp.asarray(arrays["t"])
    x_t = diffusion.q_sample(x0, t, noise)

    def total(output):
        terms = diffusion.losses(output, x0, x_t, t, noise)
        return sum(term.sum() for term in terms.values()), terms

    (_, terms), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(output)
    assert terms["mse"].dtype == terms["vb"].dtype == gradient.dtype == dtype
    return terms, gradient


def test_losses_float32():
    arrays = load("losses")
    terms, _ = training_losses(arrays, jnp.float32)
    # The mse is a mean of squares: the roundings of its terms average out.
    np.testing.assert_allclose(terms["mse"], arrays["mse"], rtol=1e-5)
    # At large t the vb is 1e-3, what remains of terms of order one that cancel: 1e-7 / 1e-3.
    np.testing.assert_allclose(terms["vb"], arrays["vb"], rtol=1e-4)


def test_losses_float64():
    arrays = load("losses")
    with jax.enable_x64(True):
        terms, gradient = training_losses(arrays, jnp.float64)
    # Theirs takes 1 - abar_t / abar_{t-1} for beta_t even where nothing is respaced: 1e-16 / beta_0 is 1e-12.
    np.testing.assert_allclose(terms["mse"], arrays["mse"], rtol=1e-10)
    np.testing.assert_allclose(terms["vb"], arrays["vb"], rtol=1e-10)
    # Also that the vb's gradient does not reach eps.
    assert_close(gradient, nhwc(arrays["output_gradient"]), 1e-10)


def test_losses_of_a_predicted_image():
    arrays = load("losses")
    diffusion, t = GaussianDiffusion(make_schedule("linear", 1000), prediction="x0"), jnp.asarray(arrays["t"])
    with jax.enable_x64(True):
        x0, noise, output = (jnp.asarray(nhwc(arrays[k]), jnp.float64) for k in ("x0", "noise", "output"))
        # The fixture's error, made of x0 instead of the noise.
        image = jnp.concatenate([x0 + output[..., :4] - noise, output[..., 4:]], axis=-1)
        terms = jax.jit(diffusion.losses)(image, x0, diffusion.q_sample(x0, t, noise), t, noise)
    np.testing.assert_allclose(terms["mse"], arrays["x0/mse"], rtol=1e-10)
    # What remains of terms of order one that cancel: 5e-8 at t = 999, and at t = 0 the mass of a bin 30 standard deviations away.
    np.testing.assert_allclose(terms["vb"], arrays["x0/vb"], rtol=1e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances(variance):
    arrays = load("losses")
    diffusion = GaussianDiffusion(make_schedule("linear", 1000), variance)
    with jax.enable_x64(True):
        ours = diffusion.log_variance(jnp.asarray(arrays["t"]), None, jnp.zeros(len(arrays["t"]), jnp.float64))
    # 1e-12 of beta_0, as above, against logarithms of order one.
    np.testing.assert_allclose(ours, arrays[f"log_variance_{variance}"], rtol=1e-11)


@pytest.fixture(scope="module")
def trajectories():
    return load("sampling")


def assert_same_trajectory(arrays, network, sampler, eta, clip, scale, tolerance):
    """Our sampler with our network against the recorded x of sampling_fixture, in fixtures/make_pytorch_fixtures.py."""
    model, params = network
    entered = {}  # timestep -> x that the network saw there

    def record(t, x):
        entered[int(t)] = np.asarray(x)

    # Three guided channels, as in the published samples.
    denoise = guided(lambda x, t, y: model.apply(params, x, t, y), arrays["y"], model.null_label, scale, 3)

    def recording(x, t):
        jax.debug.callback(record, t[0], x)
        return denoise(x, t)

    noise = jnp.asarray(nhwc(arrays["noise"]))
    steps = arrays["timestep_map"]
    diffusion = GaussianDiffusion(make_schedule("linear", 1000))
    run = jax.jit(
        lambda x: sample(recording, x, diffusion, lambda k: noise[k], sampler=sampler, num_steps=len(steps), eta=eta, clip=clip)
    )
    final = run(nhwc(arrays["x"]))
    jax.effects_barrier()

    theirs = nhwc(arrays[f"{sampler}/eta={eta}/clip={clip}/scale={scale}"])
    *kept, last = arrays["kept"]
    assert last == len(steps)
    ours = [entered[steps[len(steps) - 1 - taken]] for taken in kept] + [final]
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_sampling(trajectories, network, sampler, eta, clip, scale):
    # Ten networks one after the other: ten times the forward's tolerance.
    assert_same_trajectory(trajectories, network, sampler, eta, clip, scale, 1e-4)


def test_schedules():
    arrays = section(load("schedules"), "betas/")
    assert arrays
    for key, theirs in arrays.items():
        name, num_steps = key.split("/")
        # A beta is a difference of numbers near one: the last bit of another machine's cosine is 1e-16 of one, not of it.
        np.testing.assert_allclose(make_schedule(name, int(num_steps)).betas, theirs, rtol=0, atol=1e-15)


def test_respacing():
    arrays = load("schedules")
    schedule = make_schedule("linear", 1000)
    steps = section(arrays, "steps/")
    assert steps
    for count, theirs in steps.items():
        ours = respace(schedule, even_steps(1000, int(count)))
        np.testing.assert_array_equal(ours.model_steps, theirs)
        np.testing.assert_allclose(ours.betas, arrays[f"respaced/{count}"], rtol=0, atol=1e-15)


def test_sections():
    sections = section(load("schedules"), "sections/")
    assert sections
    for key, theirs in sections.items():
        num_steps, spec = key.split("/")
        np.testing.assert_array_equal(sampling_steps(int(num_steps), spec), theirs)


def test_loss_second_moment():
    arrays = load("resampler")
    num_steps = arrays["densities"].shape[1]
    strategy = LossSecondMomentStrategy("ours", np.ones(num_steps))
    state, update, probabilities = strategy.init(), jax.jit(strategy.update), jax.jit(strategy.probabilities)
    uniform = 0
    for t, loss, theirs in zip(arrays["t"], arrays["loss"], arrays["densities"], strict=True):
        # Ten squares in float32, their root and a sum of eight.
        np.testing.assert_allclose(probabilities(state), theirs, rtol=1e-6)
        uniform += (theirs == theirs[0]).all()
        state = update(state, t, loss)
    assert 0 < uniform < 30, "the warm-up and what follows, the batch of one timestep included, are both seen"


@pytest.fixture(scope="module")
def speedit():
    return load("speedit")


def speedit_strategy(name):
    schedule = make_schedule("squaredcos_cap_v2" if name == "squaredcos" else "linear", 1000)
    if name == "linear250":
        schedule = respace(schedule, even_steps(1000, 250))
    return make_strategy(schedule, "speedit")


@pytest.mark.parametrize("name", ["linear", "squaredcos", "linear250"])
def test_speedit_tables(speedit, name):
    strategy, theirs = speedit_strategy(name), section(speedit, f"{name}/")
    # Roundings of sigma, 1e-16, times the 1e6 inside the density's tanh.
    np.testing.assert_allclose(strategy.density, theirs["density"], rtol=1e-9)
    # Theirs goes through 1 / (1 - abar) - 1, which for the smallest 1 - abar, 4e-5, costs a few digits of sixteen.
    np.testing.assert_allclose(strategy.weights, theirs["weights"], rtol=1e-11)
    assert strategy.pivot == theirs["pivot"]
    inside = theirs["dual"] < len(strategy.density)  # theirs may step out of the table
    np.testing.assert_array_equal(strategy.dual[inside], theirs["dual"][inside])
    assert (strategy.dual < len(strategy.density)).all()


def count_covariance(strategy, n):
    """Exact covariance of how often each timestep occurs among the n of one call. [T, T]

    The n are independent pairs (t, dual(t)) and one or two timesteps whose dual is cut off.
    """
    p, every = strategy.density, np.arange(len(strategy.density))
    pushed = np.bincount(strategy.dual, weights=p, minlength=len(p))
    joint = np.zeros((len(p), len(p)))
    joint[every, strategy.dual] = p
    pair = np.diag(p + pushed) + joint + joint.T - np.outer(p + pushed, p + pushed)
    single = np.diag(p) - np.outer(p, p)
    drawn = n // 2 + 1
    return (n - drawn) * pair + (2 * drawn - n) * single


def assert_no_excess(difference, expected, covariance):
    """That differences of counts, of mean zero and known covariance, are as large as chance makes them.

    Pearson's sum of squares, over single timesteps for errors of a few, and over blocks of twenty for slight errors of many.
    With normal counts, hundreds a bin, the sum x^T D x has mean tr(D C) and variance 2 tr(D C D C). Its law is a chi-square
    of some tens to hundreds of degrees of freedom, beyond six standard deviations less than once in 1e5 seeds.
    """
    for width in (1, 20):
        blocks = np.kron(np.eye(len(expected) // width), np.ones(width))
        scale = 1 / np.sqrt(blocks @ expected)
        scaled = scale[:, None] * (blocks @ covariance @ blocks.T) * scale
        statistic = ((scale * (blocks @ difference)) ** 2).sum()
        assert abs(statistic - np.trace(scaled)) < 6 * np.sqrt(2 * (scaled**2).sum())


@pytest.mark.parametrize("n", [256, 7])
def test_speedit_marginal(speedit, n):
    strategy, counts, calls = speedit_strategy("linear"), speedit[f"histogram/{n}"], speedit[f"calls/{n}"]
    expected = calls * n * strategy.marginal(n)
    assert_no_excess(counts - expected, expected, calls * count_covariance(strategy, n))


@pytest.mark.parametrize("n", [256, 7])
def test_speedit_draws(speedit, n):
    strategy, theirs, calls = speedit_strategy("linear"), speedit[f"histogram/{n}"], int(speedit[f"calls/{n}"])
    draw = jax.jit(jax.vmap(lambda key: strategy.sample(key, n, 0, ())))
    t, weights, _ = map(np.asarray, draw(jax.random.split(jax.random.key(0), calls)))

    drawn = n // 2 + 1
    np.testing.assert_array_equal(t[:, drawn:], speedit["linear/dual"][t[:, : n - drawn]])
    np.testing.assert_allclose(weights, speedit["linear/weights"][t], rtol=1e-6)  # ours are float32

    ours = np.bincount(t.ravel(), minlength=len(strategy.density))
    # Two independent histograms of the same law: the difference has mean zero and twice the covariance.
    assert_no_excess(ours - theirs, 2 * calls * n * strategy.marginal(n), 2 * calls * count_covariance(strategy, n))
