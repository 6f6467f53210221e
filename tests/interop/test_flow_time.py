"""Turned weights against the network itself, and against the other convention's own sampler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.config import get_config
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_samplers import sample_flow
from speedit_jax.interop import dit
from speedit_jax.interop.flow_time import turned
from speedit_jax.models.build import build


def network(shift=0, learned=False):
    """(model, parameters of a state, the state): random weights of order one, so that time matters."""
    config = get_config("DiT-tiny/2").model
    config.update({"width": 32, "depth": 2, "heads": 4, "time_freq_shift": shift})
    model = build(config, image_shape=(8, 8, 4), num_classes=3, learned_variance=learned, platform="cpu")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape, np.float32) / 4 for name, shape in dit.TABLE.shapes(shapes, 2).items()}
    return model, lambda state: dit.TABLE.from_torch(state, shapes, 2), state


@pytest.mark.parametrize("shift", [0, 1])
def test_it_computes_minus_the_network_at_the_other_time(shift):
    model, params, state = network(shift)
    rng = np.random.default_rng(1)
    x, y, s = rng.standard_normal((5, 8, 8, 4), np.float32), np.arange(5) % 3, np.array([0, 0.1, 0.5, 0.77, 1], np.float32)
    apply = jax.jit(model.apply)
    wanted = -apply(params(state), x, 1 - s, y)
    ours = apply(params(turned(state, shift)), x, s, y)
    # float32 rounding of the weights and of 1 - s, through two blocks.
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(wanted - apply(params(state), x, s, y)).max() > 0.1 * np.abs(wanted).max()


def test_it_is_its_own_inverse():
    state = network()[2]
    back = turned(turned(state))
    for name in state:
        np.testing.assert_allclose(back[name], state[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_it_draws_what_repas_sampler_draws(learned):
    """REPA's Euler steps from t = 1, noise, to 0 (arXiv 2410.06940, samplers.py) with its velocity, alpha' x_0 + sigma' eps."""
    model, params, state = network(learned=learned)
    noise, y, steps = np.random.default_rng(2).standard_normal((2, 8, 8, 4), np.float32), np.array([0, 2]), 10
    theirs, x, apply = params(state), jnp.asarray(noise), jax.jit(model.apply)
    times = np.linspace(1, 0, steps + 1)
    for t, after in itertools.pairwise(times):
        velocity = apply(theirs, x, np.full(2, t, np.float32), y)[..., :4]
        x = x + np.float32(after - t) * velocity
    turned_params = params(turned(state))
    flow = FlowMatching("linear", learned_variance=learned)
    ours = sample_flow(
        lambda x, s: apply(turned_params, x, s, y), noise, flow, lambda k: 0 * noise, sampler="euler", num_steps=steps
    )
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-4 * np.abs(x).max())


def test_a_missing_tensor_is_named():
    state = network()[2]
    del state["t_embedder.mlp.0.weight"]
    assert_one_line(lambda: turned(state), "missing t_embedder.mlp.0.weight")
