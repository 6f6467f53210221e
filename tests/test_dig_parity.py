"""Our DiG against the published PyTorch code's numbers, recorded by fixtures/make_dig_fixture.py, and against itself with the
tokens turned between blocks as the published code turns them. Tolerances as in test_pytorch_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pytorch_parity import assert_close, assert_same_trajectory, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.interop import dig as names
from speedit_jax.kernels.gla import gla
from speedit_jax.models import dig, layers
from speedit_jax.models.build import build


@pytest.fixture(scope="module")
def published():
    return load("dig")


def build_dig(depth, image, implementation, directions=4):
    config = get_config().model
    config.name = "DiG-tiny/2"
    config.width, config.depth, config.heads = 16, depth, 2
    config.gla, config.directions = implementation, directions
    return build(config, image_shape=(*image, 4), num_classes=10, learned_variance=True, platform="cpu")


def build_network(published, implementation):
    """Our model with the PyTorch weights: (model, parameters)."""
    model = build_dig(4, (12, 12), implementation)
    return model, names.TABLE.from_torch(section(published, "state/"), jax.eval_shape(model.init, jax.random.key(0)), patch=2)


def test_forward(published):
    model, params = build_network(published, "xla")
    out = jax.jit(model.apply)(params, nhwc(published["x"]), published["t"], published["y"])
    assert_close(out, nhwc(published["out"]), 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_forward_float64(published, implementation):
    with jax.enable_x64(True):
        model, params = build_network(published, implementation)
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, nhwc(published["x"])))
        out = jax.jit(model.apply)(params, x, jnp.zeros(len(x), int), published["y"])
    assert out.dtype == jnp.float64
    # Roundings of 1e-16 and nothing else: there is no softmax here to fall back to float32.
    assert_close(out, nhwc(published["float64/out"]), 1e-12)


def test_gradients(published):
    model, params = build_network(published, "xla")

    def loss(params):
        out = model.apply(params, nhwc(published["x"]), published["t"], published["y"])
        return (out * nhwc(published["cotangent"])).sum()

    ours = jax.jit(jax.grad(loss))(params)
    theirs = names.TABLE.from_torch(section(published, "gradient/"), params, patch=2)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("clip", [False, True])
def test_sampling(published, clip, scale):
    """In float64, for in float32 ten steps of these random weights make 2e-4 of the last bit of a sinusoid; the final sample
    is equal to 1e-13 then, but what the callback sees on the way comes in float32.
    """
    with jax.enable_x64(True):
        model, params = build_network(published, "xla")
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        arrays = load("dig_sampling")
        assert_same_trajectory(arrays, (model, params), "ddim", eta=0.0, clip=clip, scale=scale, tolerance=1e-7)


def linear(params, x):
    """A linear layer whose kernel's first axis is the input: [..., in] -> [..., *out]."""
    return jnp.tensordot(x, params["kernel"], 1) + params["bias"]


def turned_tokens(params, x, t, y, depth, directions):
    """The network as the published code walks it: causal row-by-row blocks, and between them the tokens are flipped and
    transposed; what it leaves out, turning them back, comes at the end."""
    grid = height, width = x.shape[1] // 2, x.shape[2] // 2
    hidden = jax.nn.silu(linear(params["timestep"]["hidden"], layers.timestep_features(t)))
    c = linear(params["timestep"]["out"], hidden) + params["label"]["table"][y]
    tokens = linear(params["patch"], layers.patchify(x, 2))
    tokens = tokens + layers.sincos_position_table(height, width, tokens.shape[-1])

    def transpose(tokens):
        rows, columns = grid
        raster = np.arange(rows * columns).reshape(rows, columns)
        return tokens[:, raster.T.reshape(-1)], (columns, rows)

    for i in range(depth):
        repeat, position = divmod(i, directions)
        if (repeat + 1) * directions <= depth:
            block = jax.tree.map(lambda a, repeat=repeat: a[repeat], params["blocks"][f"block_{position}"])
        else:
            block = params[f"rest_{position}"]
        kernel = names.rearrange("conv", "kernel", position, block["conv"]["kernel"])
        block = {**block, "conv": {**block["conv"], "kernel": kernel}}

        def causal(q, k, v, log_g, reverse):
            assert not reverse
            return gla(q, k, v, log_g, implementation="reference")

        part, constrain = (lambda part, save_products: part), (lambda x, names: x)
        module = dig.DiGBlock(2, grid, (False, False), "layer", "identity", causal, None, part, constrain, jnp.float32)
        tokens, _ = module.apply({"params": block}, tokens, c)
        tokens = tokens[:, ::-1]
        if directions == 4 and i % 2:
            tokens, grid = transpose(tokens)

    tokens = tokens[:, ::-1] if depth % 2 else tokens
    if directions == 4 and depth % 4 >= 2:
        tokens, grid = transpose(tokens)
    assert grid == (height, width)
    shift, scale = jnp.moveaxis(linear(params["final_adaLN"], jax.nn.silu(c)), 1, 0)
    tokens = linear(params["final"], layers.modulate(layers.layer_norm(tokens), shift, scale))
    return layers.unpatchify(tokens, grid, 2)


@pytest.mark.parametrize("depth, directions", [(6, 4), (3, 2)])  # a period, and two blocks or one
def test_any_depth_and_grid(depth, directions):
    model = build_dig(depth, (6, 10), "xla", directions)
    rng = np.random.default_rng(2)
    # The initialisation would compute zero, with symmetric convolutions.
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), model.init(jax.random.key(0)))
    x, t, y = rng.standard_normal((2, 6, 10, 4), np.float32), np.array([3, 700]), np.array([4, 10])
    turned = jax.jit(turned_tokens, static_argnames=("depth", "directions"))(params, x, t, y, depth=depth, directions=directions)
    assert_close(jax.jit(model.apply)(params, x, t, y), turned, 1e-5)
