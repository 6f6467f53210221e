"""Tiny networks with a route past their middle blocks, and what goes in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.models.build import Model, build

HEADS = 2
FOR_FLOPS = {"image_shape": (16, 16, 4), "width": 128}  # 64 tokens, with the depth unrolled: XLA counts a loop once


@functools.cache
def make(
    name, method="route", rate=0.5, start=1, tail=1, pattern="random", path_drop=0.1, image_shape=(8, 8, 3), **keys
) -> Model:
    """keys: of the config's section `model`."""
    config = get_config()
    config.model.update({"name": name, "width": 32, "heads": HEADS} | keys)
    config.tokens.update({"method": method, "rate": float(rate), "start": start, "tail": tail, "pattern": pattern})
    config.tokens.path_drop = path_drop
    common = {"image_shape": image_shape, "num_classes": 5, "learned_variance": False, "platform": "cpu"}
    return build(config.model, tokens=config.tokens, **common)


def random_params(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape)), shapes)


def inputs(batch=3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((batch, 8, 8, 3))), jnp.arange(batch) * 300.0, jnp.arange(batch)


def share_of_flops(model, plain, outputs, *variables):
    """Of a training step of `plain`, both made FOR_FLOPS: by the models' own counts, after a comparison with XLA's of a gradient.

    XLA counts norms and activations, too.

    Args:
      outputs: ((params, *variables), x, t, the numbers of the tokens) -> the outputs of all passes of `model`, a list.
      variables: shapes of further arrays that are trained.
    """
    x, t = jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def counted(of, outputs, *variables):
        variables = (jax.eval_shape(of.init, jax.random.key(0)), *variables)
        gradient = jax.jit(jax.grad(lambda *given: sum((out**2).mean() for out in outputs(*given))))
        return gradient.lower(variables, x, t, ids).cost_analysis()["flops"]

    share = model.step_flops / plain.step_flops
    of_plain = counted(plain, lambda variables, x, t, ids: [plain.apply(*variables, x, t, t)])
    assert counted(model, outputs, *variables) / of_plain == pytest.approx(share, rel=0.02)
    return share
