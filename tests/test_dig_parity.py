"""Our DiG against the published PyTorch code's numbers, recorded by fixtures/make_dig_fixture.py, and against itself with the
tokens turned between blocks as the published code turns them. Tolerances as in test_pytorch_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_weights
from test_pytorch_parity import assert_close, load, nhwc, section

from configs.base import get_config
from speedit_jax.kernels.gla import gla
from speedit_jax.models import dig, layers
from speedit_jax.models.build import build

# Our module -> the PyTorch module: in a block, and around the blocks, where it is DiT's.
BLOCK_MODULES = {
    "adaLN": "adaLN_modulation.1",
    "attention/q": "attn.q_proj",
    "attention/k": "attn.k_proj",
    "attention/v": "attn.v_proj",
    "attention/r": "attn.g_proj",
    "attention/gate_down": "attn.gk_proj.0",
    "attention/gate_up": "attn.gk_proj.1",
    "attention/out_norm": "attn.g_norm_swish_gate",
    "attention/out": "attn.o_proj",
    "mlp/up": "mlp.gate_proj",
    "mlp/down": "mlp.down_proj",
    "conv": "dw_conv",
}
MODULES = {ours: theirs for ours, theirs in torch_weights.MODULES.items() if not ours.startswith("blocks/")}
PARAMETERS = {**torch_weights.PARAMETERS, "weight": "weight"}
PERIOD = 4


def turn(kernel, i):
    """A kernel [3, 3, D] between the raster frame and that of the i-th of the four orders; its own inverse."""
    kernel = kernel[::-1, ::-1] if i % 2 else kernel
    return kernel.swapaxes(0, 1) if i >= 2 else kernel


def from_torch(state, like):
    """Arranges PyTorch tensors, or their gradients, as our parameters for a depth that is a multiple of four."""
    unused = set(state) - torch_weights.COMPUTED

    def take(name, shape):
        unused.discard(name)
        value = state[name]
        # Linear [out, in] -> [in, out]; convolutions [out, C or 1, P, P] -> [P, P, C or 1, out].
        value = value.T if value.ndim == 2 and "embedding" not in name else value
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        # Heads, the two of SwiGLU and the chunks of adaLN are row-major in both: a reshape splits them.
        return value.reshape(shape)

    def leaf(path, target):
        *module, parameter = (key.key for key in path)
        if module[0] != "blocks":
            return take(f"{MODULES['/'.join(module)]}.{PARAMETERS[parameter]}", target.shape)
        position = int(module[1].removeprefix("block_"))
        name = f"{BLOCK_MODULES['/'.join(module[2:])]}.{PARAMETERS[parameter]}"
        repeats, *shape = target.shape
        values = [take(f"blocks.{period * PERIOD + position}.{name}", shape) for period in range(repeats)]
        if module[2:] == ["conv"] and parameter == "kernel":
            values = [turn(value, position) for value in values]
        return np.stack(values)

    params = jax.tree_util.tree_map_with_path(leaf, like)
    if unused:
        raise ValueError(f"no parameter takes {sorted(unused)}")
    return params


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
    return model, from_torch(section(published, "state/"), jax.eval_shape(model.init, jax.random.key(0)))


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
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), ours, from_torch(section(published, "gradient/"), params))


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
        block = {**block, "conv": {**block["conv"], "kernel": turn(block["conv"]["kernel"], position)}}

        def causal(q, k, v, log_g, reverse):
            assert not reverse
            return gla(q, k, v, log_g, implementation="reference")

        module = dig.DiGBlock(2, grid, (False, False), "layer", "identity", causal, lambda x, names: x, jnp.float32)
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
