"""DiG's names, both ways; that the numbers are right too is test_dig_parity.py's."""

import jax
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.interop import dig
from speedit_jax.interop.dit import Architecture
from speedit_jax.models.build import build


def shapes_of(depth, **changes):
    """Our parameters' shapes."""
    config = get_config("DiG-tiny/2").model
    config.update({"width": 16, "depth": depth, "heads": 2} | changes)
    model = build(config, image_shape=(8, 8, 4), num_classes=10, learned_variance=True, platform="cpu")
    return jax.eval_shape(model.init, jax.random.key(0))


def random_state(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in dig.TABLE.shapes(shapes, 2).items()}


# Whole periods, periods and a rest, a rest only, and other periods.
@pytest.mark.parametrize("depth, directions", [(4, 4), (8, 4), (6, 4), (3, 4), (3, 2), (2, 1)])
def test_round_trip(depth, directions):
    shapes = shapes_of(depth, directions=directions)
    state = random_state(shapes)
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == set(map(str, range(depth)))
    params = dig.TABLE.from_torch(state, shapes, 2)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    back = dig.TABLE.to_torch(params, 2)
    assert back.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])


def test_layers_of_a_period_and_the_rest():
    shapes = shapes_of(10)
    state = random_state(shapes)
    params = dig.TABLE.from_torch(state, shapes, 2)
    place = {3: lambda p: jax.tree.map(lambda a: a[0], p["blocks"]["block_3"]), 9: lambda p: p["rest_1"]}
    place[6] = lambda p: jax.tree.map(lambda a: a[1], p["blocks"]["block_2"])
    for layer, find in place.items():
        np.testing.assert_array_equal(find(params)["mlp"]["down"]["kernel"], state[f"blocks.{layer}.mlp.down_proj.weight"].T)


def test_convolutions_are_turned_as_the_tokens_were():
    state = random_state(shapes_of(4))
    params = dig.TABLE.from_torch(state, shapes_of(4), 2)
    kernel = np.arange(9).reshape(3, 3, 1)
    for i, expected in enumerate((kernel, np.rot90(kernel, 2), kernel.swapaxes(0, 1), np.rot90(kernel, 2).swapaxes(0, 1))):
        np.testing.assert_array_equal(dig.rearrange("conv", "kernel", i, kernel), expected)
        np.testing.assert_array_equal(dig.rearrange("conv", "kernel", i, dig.rearrange("conv", "kernel", i, kernel)), kernel)
        theirs = state[f"blocks.{i}.dw_conv.weight"][:, 0].transpose(1, 2, 0)
        ours = params["blocks"][f"block_{i}"]["conv"]["kernel"][0]
        np.testing.assert_array_equal(ours, dig.rearrange("conv", "kernel", i, theirs))


@pytest.mark.parametrize("norm, convolution", [("layer", "identity"), ("rms", "none")])
def test_describe(norm, convolution):
    state = random_state(shapes_of(4, norm=norm, convolution=convolution))
    network = dig.describe(state)
    assert network == Architecture("DiG", 16, 4, 2, 4, 8, label_rows=11, tokens=0, heads=2, norm=norm, convolution=convolution)
    assert dig.is_dig(state)
    assert not dig.is_dig({"blocks.0.attn.qkv.weight": None})


def test_rms_norms_have_two_names():
    shapes = shapes_of(4, norm="rms")
    state = random_state(shapes)
    both = dig.with_aliases(state)
    assert both.keys() - state.keys() == {f"blocks.{i}.{name}_norm.weight" for i in range(4) for name in ("attn", "mlp")}
    assert dig.without_aliases(both).keys() == state.keys()
    with pytest.raises(UserError, match=r"blocks\.2\.attn_norm\.weight is not blocks\.2\.norm1\.weight"):
        dig.without_aliases(both | {"blocks.2.attn_norm.weight": np.zeros(16)})
    # Without RMS norms there is only one name for everything.
    plain = random_state(shapes_of(4))
    assert dig.with_aliases(plain).keys() == plain.keys()


def test_skips_are_refused():
    state = random_state(shapes_of(4)) | {"blocks.3.skip_linear.bias": np.zeros(16)}
    with pytest.raises(UserError, match=r"extra blocks\.3\.skip_linear\.bias"):
        dig.TABLE.from_torch(state, shapes_of(4), 2)
