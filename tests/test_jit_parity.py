"""Flows that predict the image, and their network, against the PyTorch code of JiT: numbers of fixtures/make_jit_fixture.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_samplers import sample_flow
from speedit_jax.interop.layout import Table
from speedit_jax.models.build import build

JIT = FlowMatching("linear", predicts_x0=True, clamp=0.05, noise_scale=2.0)
TIMES = (0.0, 0.02, 0.3, 0.5, 0.8, 0.98)
STEPS = 12
TABLE = Table(
    {
        "patch_bottleneck": "x_embedder.proj1",
        "patch": "x_embedder.proj2",
        "timestep/hidden": "t_embedder.mlp.0",
        "timestep/out": "t_embedder.mlp.2",
        "final_adaLN": "final_layer.adaLN_modulation.1",
        "final_norm": "final_layer.norm_final",
        "final": "final_layer.linear",
    },
    {
        "adaLN": "adaLN_modulation.1",
        "norm1": "norm1",
        "norm2": "norm2",
        "attention/qkv": "attn.qkv",
        "attention/q_norm": "attn.q_norm",
        "attention/k_norm": "attn.k_norm",
        "attention/out": "attn.proj",
        "mlp/up": "mlp.w12",
        "mlp/down": "mlp.w3",
    },
)


@pytest.fixture(scope="module")
def jit():
    return load("jit")


def test_the_network(jit):
    config = get_config().model
    config.update({"name": "DiT-tiny/4", "width": 24, "depth": 2, "heads": 2, "qk_norm": True})
    config.update({"rope": True, "mlp": "swiglu", "norm": "rms", "patch_bottleneck": 8})
    model = build(config, image_shape=(16, 16, 3), num_classes=0, learned_variance=False, platform="cpu")
    state = section(jit, "state/")
    first = state["x_embedder.proj1.weight"]  # a convolution; ours is the linear layer of the same patches
    state["x_embedder.proj1.weight"] = first.transpose(0, 2, 3, 1).reshape(len(first), -1)
    params = TABLE.from_torch(state, jax.eval_shape(model.init, jax.random.key(0)), patch=1)
    out = jax.jit(model.apply)(params, nhwc(jit["x"]), jit["t"], jnp.zeros(len(jit["t"]), jnp.int32))
    assert np.abs(jit["out"]).max() > 1
    assert_close(out, nhwc(jit["out"]), 1e-5)


def known(z, s):
    return jnp.sin(3 * z) + s.reshape(-1, 1, 1, 1)


def test_the_loss(jit):
    arrays = section(jit, "process/")
    with jax.enable_x64(True):
        x, noise, s = jnp.asarray(nhwc(arrays["x"])), jnp.asarray(nhwc(arrays["noise"])), jnp.asarray(TIMES)
        z = JIT.q_sample(x, s, noise)
        assert_close(JIT.losses(known(z, s), x, z, s, noise)["mse"], arrays["loss"], 1e-12)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_samples(jit, sampler):
    with jax.enable_x64(True):
        start = jnp.asarray(nhwc(jit["process/start"]))
        drawn = sample_flow(known, start, JIT, jnp.zeros_like, sampler=sampler, num_steps=STEPS)
    assert_close(drawn, nhwc(jit[sampler]), 1e-12)
