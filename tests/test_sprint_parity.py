"""SPRINT's network and what guides it, against the published PyTorch code: numbers of fixtures/make_sprint_fixture.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.config import get_config
from speedit_jax.interop import dit as names
from speedit_jax.interop.layout import Table
from speedit_jax.models.build import build
from speedit_jax.models.routing import Route
from speedit_jax.sampling.path_drop import without_middle

TABLE = Table(names.MODULES | {"sprint/fusion": "renoise_linear"}, names.BLOCK_MODULES)
FIRST = {"encoder": 0, "middle": 1, "decoder": 3}  # block of each part
NULL = 10


@pytest.fixture(scope="module")
def sprint():
    return load("sprint")


@functools.cache
def network():
    config = get_config()
    config.model.update({"name": "DiT-tiny/2", "width": 16, "depth": 4, "heads": 2})
    config.tokens.update({"method": "sprint", "start": 1, "tail": 1, "rate": 0.75, "pattern": "cells"})
    common = {"image_shape": (8, 8, 4), "num_classes": NULL, "learned_variance": False, "platform": "cpu"}
    return build(config.model, tokens=config.tokens, **common)


def as_ours(state, mask):
    """Its tensors, or their gradients, as our parameters; the order of channels and pixels in a patch is another."""
    state = {re.sub(r"^(\w+)_blocks\.(\d+)", lambda m: f"blocks.{FIRST[m[1]] + int(m[2])}", k): v for k, v in state.items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(-1, 4, 2, 2)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        last = state[name]
        state[name] = np.moveaxis(last.reshape(4, 4, *last.shape[1:]), 0, 1).reshape(last.shape)
    like = jax.eval_shape(network().init, jax.random.key(0))
    del like["sprint"]["mask"]
    params = TABLE.from_torch(state, like, patch=2)
    params["sprint"]["mask"] = mask
    return params


def weights(sprint):
    state = section(sprint, "state/")
    return as_ours(state, state.pop("mask_token").ravel())


def test_what_it_computes(sprint):
    """With a route, with all tokens, and both halves of its guidance."""
    model, params = network(), weights(sprint)
    x, t, y = nhwc(sprint["x"]), sprint["t"], sprint["y"]
    guide = without_middle(model, params, NULL)
    outs = jax.jit(lambda params: (routed(model, sprint, params), model.apply(params, x, t, y), guide(x, t, jnp.asarray(y))))(
        params
    )
    for out, name in zip(outs, ("routed", "all_tokens", "without"), strict=True):
        assert_close(out, nhwc(sprint[name]), 1e-5)
    np.testing.assert_allclose(sprint["conditional"], sprint["all_tokens"], atol=1e-5)
    assert np.abs(sprint["routed"] - sprint["all_tokens"]).max() > 0.1
    assert np.abs(sprint["without"] - sprint["all_tokens"]).max() > 0.1


def routed(model, sprint, params, **options):
    kept = sprint["keep"].shape[1]
    assert kept == model.kept
    restore = sprint["restore"].astype(np.int32)
    route = Route(jnp.argsort(restore, axis=1), jnp.asarray(restore), kept, model.cell)
    return model.apply(params, nhwc(sprint["x"]), sprint["t"], sprint["y"], route=route, **options)


def test_a_training_pass_with_dropped_paths(sprint):
    """Values, and every gradient that the published code has: its mask token has none."""
    model, params = network(), weights(sprint)

    @jax.jit
    def gradient(params, dropped):
        def loss(params):
            out = routed(model, sprint, params, dropped=dropped)
            return (out * nhwc(sprint["cotangent"])).sum(), out

        return jax.grad(loss, has_aux=True)(params)

    ours, out = gradient(params, sprint["dropped"])
    assert_close(out, nhwc(sprint["trained"]), 1e-5)
    theirs = as_ours(section(sprint, "gradient/"), ours["sprint"]["mask"])
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(other).any(), path
        assert_close(leaf, other, 2e-5)
    # Where all paths are dropped, the middle blocks have no gradient, exactly.
    all_dropped, _ = gradient(params, np.ones_like(sprint["dropped"]))
    for leaf in map(np.asarray, jax.tree.leaves(all_dropped["blocks"])):
        assert not leaf[1:3].any() and leaf[0].any() and leaf[3].any()
