"""The masked pass against the published code of MDT's first version, whose numbers fixtures/make_mdt_fixture.py recorded."""

import functools

import jax
import numpy as np
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.interop import dit as names
from speedit_jax.models.build import build
from speedit_jax.models.routing import Route


def side_parameters(state, like):
    """Ours of a side block and its token, or of their gradients."""
    block = {name.replace("sideblocks", "blocks"): leaf for name, leaf in state.items() if name.startswith("sideblocks")}
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), like["side"])
    found = names.TABLE.from_torch(block, {"blocks": stacked}, patch=2)["blocks"]
    return {"side": jax.tree.map(lambda leaf: leaf[0], found), "token": state["mask_token"].reshape(-1)}


def test_a_masked_pass():
    """The output, and the gradients of all that is the pass's own and of a layer before and after it; float32."""
    mdt, config = load("mdt"), get_config()
    config.model.update({"name": "DiT-tiny/2", "width": 32, "depth": 2, "heads": 4})
    config.tokens.update({"method": "mask", "rate": 0.3, "tail": 1})
    common = {"image_shape": (8, 8, 4), "num_classes": 10, "learned_variance": True, "platform": "cpu"}
    model = build(config.model, tokens=config.tokens, **common)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = names.TABLE.from_torch(section(load("dit"), "state/"), shapes, patch=2)
    like = jax.eval_shape(model.interpolater.init, jax.random.key(0))
    mask = side_parameters(section(mdt, "state/"), like)
    kept = mdt["kept"].astype(np.int32)
    masked = np.stack([np.setdiff1d(np.arange(16), row) for row in kept]).astype(np.int32)
    order = np.concatenate([kept, masked], axis=1)
    route = Route(order, np.argsort(order, axis=1), kept.shape[1])

    def run(params, mask):
        fill = functools.partial(model.interpolater.apply, mask)
        out = model.apply(params, nhwc(mdt["x"]), mdt["t"], mdt["y"], route=route, fill=fill)
        return (out * nhwc(mdt["cotangent"])).sum(), out

    (_, out), (gradient, of_mask) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(params, mask)
    assert_close(out, nhwc(mdt["out"]), 1e-5)
    theirs = section(mdt, "gradient/")
    jax.tree.map(functools.partial(assert_close, tolerance=1e-4), of_mask, side_parameters(theirs, like))
    ours = names.TABLE.to_torch(gradient, patch=2)
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert_close(ours[name], theirs[name], 1e-4)
