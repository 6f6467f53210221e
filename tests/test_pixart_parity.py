"""Our network against diffusers' PixArtTransformer2DModel, recorded by fixtures/make_pixart_fixture.py.

Its tensors went through PixArt's own converter, so that both kinds of names are checked by others. Tolerances as in
test_pytorch_parity.py.
"""

import json

import jax
import numpy as np
import pytest
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import guided, sample
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.errors import UserError
from speedit_jax.interop import dit, pixart
from speedit_jax.interop.weights import Weights
from speedit_jax.models.build import build
from speedit_jax.models.condition import TextShape, padded


@pytest.fixture(scope="module")
def arrays():
    return load("pixart")


@pytest.fixture(scope="module")
def model(arrays):
    config = get_config("DiT-tiny/2").model
    config.update({"width": 16, "depth": 2, "heads": 2, "adaln": "single", "position_scale": 2.0})
    text = TextShape(arrays["text"].shape[2], arrays["text"].shape[1])
    return build(config, image_shape=(8, 8, 4), num_classes=0, learned_variance=True, platform="cpu", text=text)


@pytest.fixture(scope="module")
def params(arrays, model):
    return pixart.TABLE.from_torch(section(arrays, "state/"), jax.eval_shape(model.init, jax.random.key(0)), patch=2)


def condition(arrays, model):
    return padded(arrays["text"], arrays["length"], model.text)


def test_forward(arrays, model, params):
    out = jax.jit(model.apply)(params, nhwc(arrays["x"]), arrays["t"], condition(arrays, model))
    assert_close(out, nhwc(arrays["out"]), 1e-5)


def test_gradient_of_every_tensor(arrays, model, params):
    def inner(params):
        out = model.apply(params, nhwc(arrays["x"]), arrays["t"], condition(arrays, model))
        return (out * nhwc(arrays["cotangent"])).sum()

    ours = pixart.to_diffusers(pixart.TABLE.to_torch(jax.jit(jax.grad(inner))(params), patch=2))
    theirs = section(arrays, "gradient/")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        # A key's bias moves all logits of a query by as much, so its gradient is zero but for rounding.
        if name.endswith("to_k.bias"):
            assert max(np.abs(of[name]).max() for of in (ours, theirs)) < 1e-3
        else:
            assert_close(ours[name], theirs[name], 1e-4)


def test_names_both_ways(arrays, model, params):
    published, diffusers = section(arrays, "state/"), section(arrays, "diffusers/")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    for found, wanted in (
        (pixart.TABLE.to_torch(params, patch=2), published),
        (pixart.to_diffusers(published), diffusers),
        (pixart.TABLE.to_torch(pixart.from_diffusers(diffusers, shapes, patch=2), patch=2), published),
    ):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_twenty_steps_of_ddim_with_guidance(arrays, model, params):
    noise, null = nhwc(arrays["x"]), padded(arrays["null"], arrays["null_length"], model.text)
    diffusion = GaussianDiffusion(make_schedule("linear", 1000), "learned_range")

    def draw(noise, y, null):
        denoise = guided(lambda x, t, y: model.apply(params, x, t, y), y, null, 4.5, 4)
        return sample(denoise, noise, diffusion, lambda k: 0 * noise, sampler="ddim", num_steps="ddim20")

    # Guidance doubles each network's roundings, and twenty steps add them up.
    assert_close(jax.jit(draw)(noise, condition(arrays, model), null), nhwc(arrays["drawn"]), 1e-4)


def test_the_network_of_its_tensors(arrays):
    of_tensors = pixart.describe(section(arrays, "state/"))
    of_config = pixart.describe_diffusers(json.loads(str(arrays["config"])))
    wanted = {"label_rows": 0, "adaln": "single", "text_width": 12, "text_length": 120}
    assert of_tensors == dit.Architecture("DiT", 16, 2, 2, 4, 8, tokens=0, **wanted)
    assert of_config == dit.Architecture("DiT", 16, 2, 2, 4, 8, tokens=16, heads=2, position_scale=2.0, **wanted)
    ours, theirs = pixart.diffusers_config(of_config), json.loads(str(arrays["config"]))
    # Theirs leaves open what follows from the size.
    assert {key: value for key, value in ours.items() if theirs[key] != value} == {"use_additional_conditions": False}


@pytest.mark.parametrize("name", ["csize_embedder.mlp.0.weight", "ar_embedder.mlp.0.weight"])
def test_the_multi_scale_network_is_refused(arrays, name):
    with pytest.raises(UserError, match=f"{name}, so it is the 1024 px PixArt-alpha"):
        pixart.trained(section(arrays, "state/") | {name: np.zeros(3)})


def test_sigma_is_refused(arrays):
    state = section(arrays, "state/")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.q_norm\.weight, so it is PixArt-Sigma"):
        pixart.trained(state | {"blocks.0.attn.q_norm.weight": np.zeros(8)})
    with pytest.raises(UserError, match="300 tokens, so it is PixArt-Sigma"):
        pixart.trained(state | {pixart.NULL_CAPTION: np.zeros((300, 12))})
    assert pixart.trained(state | {pixart.NULL_CAPTION: np.zeros((120, 12))}).keys() == state.keys()


@pytest.mark.parametrize("changes", [{"sample_size": 128}, {"use_additional_conditions": True}])
def test_a_multi_scale_config_is_refused(arrays, changes):
    with pytest.raises(UserError, match="use_additional_conditions, so it is the 1024 px"):
        pixart.describe_diffusers(json.loads(str(arrays["config"])) | {"use_additional_conditions": None} | changes)


def test_the_first_releases_called_it_otherwise(arrays):
    config = json.loads(str(arrays["config"])) | {"_class_name": "Transformer2DModel"}
    found = Weights({}, {}, config)
    assert found.describe({}).adaln == "single" and found.time_freq_shift == 0
