"""DiT's names, both ways; that the numbers are right too is test_pytorch_parity.py's."""

import jax
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.interop import dit
from speedit_jax.interop.dit import Architecture
from speedit_jax.models.build import build


def shapes_of(name="DiT-tiny/2", image=(8, 8, 4), classes=10, learned=True, **changes):
    """Our parameters' shapes."""
    config = get_config(name).model
    config.update({"width": 32, "depth": 3, "heads": 4} | changes)
    model = build(config, image_shape=image, num_classes=classes, learned_variance=learned, platform="cpu")
    return jax.eval_shape(model.init, jax.random.key(0))


def random_state(shapes, patch, table=dit.TABLE):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in table.shapes(shapes, patch).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
    "options",
    [{}, {"name": "DiT-tiny/4", "image": (16, 8, 3)}, {"classes": 0}, {"learned": False, "mlp_ratio": 2.0}, {"depth": 1}],
    ids=str,
)
def test_round_trip(options):
    shapes, patch = shapes_of(**options), int(options.get("name", "/2").partition("/")[2])
    state = random_state(shapes, patch)
    params = dit.TABLE.from_torch(state, shapes, patch)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    assert_equal(dit.TABLE.to_torch(params, patch), state)


def test_every_tensor_counts():
    shapes = shapes_of()
    state = random_state(shapes, 2)
    params = dit.TABLE.from_torch(state, shapes, 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in state.values())
    # A linear layer is transposed, and a layer is a row of what the scan stacks.
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][2], state["blocks.2.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(params["label"]["table"], state["y_embedder.embedding_table.weight"])


def test_a_mismatch_names_tensors():
    shapes = shapes_of()
    state = random_state(shapes, 2)
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.0.attn.q_norm.weight"] = np.ones(8)
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"][:16]
    with pytest.raises(UserError) as e:
        dit.TABLE.from_torch(state, shapes, 2)
    for words in (
        "missing blocks.1.attn.qkv.bias",
        "extra blocks.0.attn.q_norm.weight",
        "final_layer.linear.weight has shape (16, 32), not (32, 32)",
    ):
        assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_many_mismatches_are_counted():
    with pytest.raises(UserError, match=r"and 36 more$"):
        dit.TABLE.from_torch({}, shapes_of(), 2)


def test_describe():
    state = random_state(shapes_of("DiT-tiny/4", (16, 16, 3), mlp_ratio=2.0), 4) | {"pos_embed": np.zeros((1, 16, 32))}
    assert dit.describe(state) == Architecture("DiT", 32, 3, 4, 3, 6, label_rows=11, tokens=16, mlp_ratio=2.0)
    odd = random_state(shapes_of(width=44, mlp_ratio=30.5 / 44), 2)
    assert odd["blocks.0.mlp.fc1.weight"].shape == (30, 44) and int(44 * (30 / 44)) == 29
    assert int(44 * dit.describe(odd).mlp_ratio) == 30
    state = random_state(shapes_of(classes=0, learned=False), 2)
    assert dit.describe(state) == Architecture("DiT", 32, 3, 2, 4, 4, label_rows=0, tokens=0)


@pytest.mark.parametrize("change", ["missing", "axes"])
def test_describe_names_what_it_misses(change):
    state = random_state(shapes_of(), 2)
    name = "x_embedder.proj.weight"
    state[name] = state[name].reshape(32, -1)
    if change == "missing":
        del state[name]
    with pytest.raises(UserError, match=name):
        dit.describe(state)


NETWORK = Architecture("DiT", 32, 3, 2, 4, 8, label_rows=11, tokens=16, heads=4)


def diffusers_state():
    """(our shapes, the published code's tensors, diffusers')."""
    shapes = shapes_of()
    state = random_state(shapes, 2)
    return shapes, state, dit.to_diffusers(state)


def test_diffusers_round_trip():
    shapes, state, renamed = diffusers_state()
    params = dit.from_diffusers(renamed, shapes, 2)
    assert_equal(dit.TABLE.to_torch(params, 2), state)
    assert dit.describe_diffusers(dit.diffusers_config(NETWORK)) == NETWORK
    # Older versions stored the position table.
    dit.from_diffusers(renamed | {"pos_embed.pos_embed": np.zeros((1, 16, 32))}, shapes, 2)


def test_diffusers_has_the_embedders_in_every_block():
    shapes, state, renamed = diffusers_state()
    name = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    for i in range(3):
        np.testing.assert_array_equal(renamed[name.format(i)], state["y_embedder.embedding_table.weight"])
    renamed[name.format(2)] = renamed[name.format(2)] + 1
    with pytest.raises(UserError, match=r"transformer_blocks\.2\.norm1\.emb\.class_embedder.* is not transformer_blocks\.0"):
        dit.from_diffusers(renamed, shapes, 2)


def test_a_mismatch_names_diffusers_tensors():
    shapes, _, renamed = diffusers_state()
    del renamed["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(UserError, match=r"missing transformer_blocks\.1\.attn1\.to_k\.bias"):
        dit.from_diffusers(renamed, shapes, 2)


@pytest.mark.parametrize(
    "change", [{"_class_name": "UNet2DModel"}, {"norm_type": "ada_norm"}, {"activation_fn": "geglu"}, {"attention_bias": False}]
)
def test_another_diffusers_model_is_refused(change):
    (key,) = change
    with pytest.raises(UserError, match="_class|UNet2DModel" if key == "_class_name" else key):
        dit.describe_diffusers(dit.diffusers_config(NETWORK) | change)
