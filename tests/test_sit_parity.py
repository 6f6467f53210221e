"""Flows against the published PyTorch code of SiT, whose numbers fixtures/make_sit_fixture.py recorded."""

import jax
import jax.numpy as jnp
import pytest
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.flow_samplers import FLOW_SAMPLERS, sample_flow
from speedit_jax.interop import dit as names
from speedit_jax.models.build import build

PUBLISHED = {"euler": "euler", "heun": "heun2", "sde": "sde"}
TIMES = (0.02, 0.3, 0.5, 0.8, 0.98)


@pytest.fixture(scope="module")
def sit():
    return load("sit")


def test_forward(sit):
    config = get_config().model
    config.update({"name": "DiT-tiny/2", "width": 32, "depth": 2, "heads": 4})
    model = build(config, image_shape=(8, 8, 4), num_classes=10, learned_variance=True, platform="cpu")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = names.TABLE.from_torch(section(load("dit"), "state/"), shapes, patch=2)
    out = jax.jit(model.apply)(params, nhwc(sit["x"]), sit["t"], sit["y"])
    assert_close(FlowMatching("linear", learned_variance=True).split_output(out), nhwc(sit["out"]), 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_path(sit, path):
    arrays = section(sit, f"{path}/")
    x0, noise, x_s, target, eps = (nhwc(arrays[k]) for k in ("x0", "noise", "x_s", "target", "eps_of_velocity"))
    with jax.enable_x64(True):
        flow, s = FlowMatching(path), jnp.asarray(TIMES)
        assert_close(flow.q_sample(jnp.asarray(x0), s, jnp.asarray(noise)), x_s, 1e-13)
        assert (flow.losses(target, x0, x_s, s, noise)["mse"] < 1e-26).all()
        v = jnp.sin(3 * jnp.asarray(x_s)) + s.reshape(-1, 1, 1, 1)
        assert_close(flow.x0_and_noise(v, jnp.asarray(x_s), s)[1], eps, 1e-12)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_samples(sit, path, sampler):
    arrays = section(sit, f"{path}/")
    with jax.enable_x64(True):
        start, z = jnp.asarray(nhwc(arrays["start"])), jnp.asarray(nhwc(arrays["z"]))
        drawn = sample_flow(
            lambda x, s: jnp.sin(3 * x) + s.reshape(-1, 1, 1, 1),
            start,
            FlowMatching(path),
            # The published code draws the first step's noise first; the sde's last step draws none.
            lambda k: z[k],
            sampler=sampler,
            num_steps=len(z),
        )
    # The published times are float32: 3e-8 in each step, amplified along the way.
    assert_close(drawn, nhwc(arrays[PUBLISHED[sampler]]), 1e-6)
