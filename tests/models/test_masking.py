"""The masked pass of a network, and its side-interpolater. Against the published code: tests/test_mdt_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routes
from routes import FOR_FLOPS, inputs, random_params, share_of_flops

from speedit_jax.errors import UserError
from speedit_jax.models import layers
from speedit_jax.models.routing import Route, draw_route

DEPTH, TOKENS, KEPT = 4, 16, 10

make = functools.partial(routes.make, name="DiT-tiny/2", method="mask", depth=DEPTH, rate=0.4)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_mask(model):
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(model.interpolater.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape)), shapes)


def random_route(kept=KEPT):
    return Route(*draw_route(jax.random.key(0), 3, (4, 4), kept), kept)


def masked_pass(model, params, mask, x, t, y, route):
    return model.apply(params, x, t, y, route=route, fill=functools.partial(model.interpolater.apply, mask))


def test_the_unmasked_pass_is_the_plain_network():
    """The same programs for the initial parameters and for the output; the side-interpolater begins as MDT's."""
    masked, plain = make(), make(method="none")
    assert (masked.kept, masked.middle, plain.interpolater) == (KEPT, (0, DEPTH - 1), None)
    params, arguments = random_params(plain), inputs()
    for name, given in (("init", (jax.random.key(0),)), ("apply", (params, *arguments))):
        one, other = (jax.jit(getattr(model, name)).lower(*given).as_text() for model in (masked, plain))
        assert one == other, name
    mask = jax.jit(masked.interpolater.init)(jax.random.key(1))
    assert jax.tree.map(jnp.shape, mask["side"]) == jax.tree.map(lambda leaf: leaf.shape[1:], params["blocks"])
    assert mask["token"].shape == (32,) and 0.01 < mask["token"].std() < 0.03
    assert not mask["side"]["adaLN"]["kernel"].any() and mask["side"]["mlp"]["up"]["kernel"].any()


def test_what_is_kept_does_not_depend_on_the_side_block(x64):
    """At the decoder's input: as it came to the bit, with a gradient of exactly 0; what is masked depends on all."""
    model, route = make(), random_route()
    mask, rng = random_mask(model), np.random.default_rng(3)
    seen, c = jnp.asarray(rng.standard_normal((3, KEPT, 32))), jnp.asarray(rng.standard_normal((3, 32)))
    apply = jax.jit(lambda mask, seen: model.interpolater.apply(mask, seen, route, c))
    out = apply(mask, seen)
    kept = jnp.arange(3)[:, None], route.order[:, :KEPT]
    np.testing.assert_array_equal(out[kept], seen)

    def total(mask, seen, ids):
        return (apply(mask, seen)[jnp.arange(3)[:, None], ids] ** 2).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    of_mask, of_seen = gradient(mask, seen, kept[1])
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_mask))
    np.testing.assert_array_equal(of_seen, 2 * seen)
    of_mask, of_seen = gradient(mask, seen, route.order[:, KEPT:])
    assert all(leaf.any() for leaf in jax.tree.leaves(of_mask)) and np.asarray(of_seen).all()


def test_what_is_masked_is_not_seen(x64):
    """The output does not depend on the masked patches, and does on all that are kept; with rotary positions, too."""
    model, route = make(rope=True, norm="rms", adaln="single"), random_route()
    params, mask, (x, t, y) = random_params(model), random_mask(model), inputs()
    cotangent = np.random.default_rng(4).standard_normal(x.shape)
    gradient = jax.jit(jax.grad(lambda x: (masked_pass(model, params, mask, x, t, y, route) * cotangent).sum()))(x)
    patches = np.abs(layers.patchify(gradient, 2)).sum(axis=2)
    is_masked = np.asarray(route.inverse) >= KEPT
    assert not patches[is_masked].any() and patches[~is_masked].all()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_pass_that_masks_nothing_is_the_unmasked_one(x64, remat):
    model = make(remat=remat)
    params, mask, arguments = random_params(model), random_mask(model), inputs()
    ours = jax.jit(functools.partial(masked_pass, model, route=random_route(TOKENS)))(params, mask, *arguments)
    np.testing.assert_allclose(ours, jax.jit(model.apply)(params, *arguments), atol=1e-12)


@pytest.mark.slow
def test_flops_are_xlas():
    masked, plain = (make(method=method, rate=0.3, scan_unroll=DEPTH, **FOR_FLOPS) for method in ("mask", "none"))
    mask = jax.eval_shape(masked.interpolater.init, jax.random.key(0))

    def outputs(variables, x, t, ids):
        params, mask = variables
        return [masked.apply(params, x, t, t), masked_pass(masked, params, mask, x, t, t, Route(ids, ids, masked.kept))]

    assert 1.9 < share_of_flops(masked, plain, outputs, mask) < 2.1


# MDT's own masking and decoders, in DiT's table of sizes: a closed form by hand.
@pytest.mark.parametrize("size, share", [("S", 1.82), ("B", 1.82), ("L", 1.76), ("XL", 1.75)])
def test_flops_of_the_papers_sizes(size, share):
    sizes = {"name": f"DiT-{size}/2", "width": 0, "depth": 0, "heads": 0, "image_shape": (32, 32, 4)}
    model = make(rate=0.3, tail=2, **sizes)
    assert model.step_flops / (3 * model.forward_flops) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"tail": 0}, r"tokens\.tail=0.*of 4"),
        ({"tail": 4}, r"tokens\.tail=4.*of 4"),
        ({"rate": 0.0}, r"tokens\.rate=0\.0"),
        ({"name": "DiG-tiny/2"}, r"tokens\.method=mask is for DiT"),
        ({"pattern": "cells"}, r"tokens\.rate=0\.4.*0\.5 and 0\.75"),
    ],
)
def test_impossible_masks(keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)


def test_the_first_block_is_always_the_encoders():
    assert make(start=99).middle == (0, DEPTH - 1)
