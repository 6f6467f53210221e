"""Tiny networks with a route past their middle blocks, and what goes in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.config import get_config
from speedit_jax.models.build import Model, build

HEADS = 2


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
