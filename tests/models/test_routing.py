"""Tokens that skip the middle blocks: against a dense network whose attention does not see them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routes
from routes import FOR_FLOPS, HEADS, inputs, random_params, share_of_flops

from speedit_jax.errors import UserError
from speedit_jax.models import layers
from speedit_jax.models.dit import DiTBlock
from speedit_jax.models.routing import Route, draw_route, taken, taken_back

DEPTH, TOKENS = 5, 16


make = functools.partial(routes.make, name="DiT-tiny/2", depth=DEPTH)


def random_route(kept, batch=3, seed=0):
    return Route(*draw_route(jax.random.key(seed), batch, (4, 4), kept), kept)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_what_skips_arrives_unchanged(x64):
    """To the bit, and its derivative is exactly 1 for itself and 0 for all others."""
    route = random_route(6)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, TOKENS, 4)))

    def through(x):
        seen, skipping = taken(x, route)
        assert seen.shape == (3, 6, 4) and skipping.shape == (3, 10, 4)
        return taken_back(jnp.sin(seen), skipping, route)

    out, seen = through(x), np.zeros((3, TOKENS), bool)
    for row, ids in enumerate(np.asarray(route.order)[:, :6]):
        seen[row, ids] = True
    np.testing.assert_array_equal(out, np.where(seen[..., None], jnp.sin(x), x))
    one_by_one = jax.jacrev(through)(x)
    expected = np.einsum("bik,bj,cd,ij->bicjd", np.ones((3, TOKENS, 1)), np.ones((3, TOKENS)), np.eye(4), np.eye(TOKENS))
    for row in range(3):
        jacobian = np.asarray(one_by_one[row, :, :, row])
        np.testing.assert_array_equal(jacobian[~seen[row]], expected[row][~seen[row]])


@pytest.mark.parametrize("keys", [{}, {"rope": True, "qk_norm": True, "norm": "rms", "mlp": "swiglu"}], ids=["plain", "rope"])
def test_against_a_dense_network_that_does_not_look(x64, keys):
    """Logits to the tokens that skip at -inf in the middle blocks, and these tokens left as they came: values and gradients."""
    model, route = make(**keys), random_route(8)
    params, (x, t, y) = random_params(model), inputs()
    seen = jnp.zeros((3, TOKENS), bool).at[jnp.arange(3)[:, None], route.order[:, :8]].set(True)

    def attention(q, k, v, mask):
        logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf)), v)

    def dense(params):
        tokens = model.apply(params, x, t, y, taps=(1,))[1][0]
        c = layers.TimestepEmbedder(32, 0, None).apply({"params": params["timestep"]}, t) + params["label"]["table"][y]
        for i in range(1, DEPTH):
            mask = seen if i < DEPTH - 1 else jnp.ones_like(seen)
            options = (keys.get("mlp", "gelu"), keys.get("norm", "layer"), (4, 4) if "rope" in keys else None)
            look = functools.partial(attention, mask=mask)
            block = DiTBlock(HEADS, 4.0, "qk_norm" in keys, look, None, lambda x, names: x, None, *options)
            out, _ = block.apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])}, tokens, c)
            tokens = jnp.where(mask[..., None], out, tokens)
        return tokens

    def routed(params):
        return model.apply(params, x, t, y, route=route, taps=(DEPTH,))[1][0]

    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal((3, TOKENS, 32)))

    def value_and_gradient(f):
        def loss(params):
            tokens = f(params)
            return (tokens * cotangent).sum(), tokens

        gradient, tokens = jax.jit(jax.grad(loss, has_aux=True))(params)
        return tokens, gradient

    (ours, ours_gradient), (expected, gradient) = map(value_and_gradient, (routed, dense))
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert np.abs(ours - jax.jit(functools.partial(model.apply, taps=(DEPTH,)))(params, x, t, y)[1][0]).max() > 0.1
    gradients = ours_gradient, gradient
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * scale), *gradients)


def test_the_order_of_those_that_are_seen_does_not_matter(x64):
    model, route = make(rope=True), random_route(8)
    params, arguments = random_params(model), inputs()
    shuffled = route.order[:, [*np.random.default_rng(0).permutation(8), *range(8, TOKENS)]]
    other = Route(shuffled, jnp.argsort(shuffled), 8)
    outs = [jax.jit(functools.partial(model.apply, route=of))(params, *arguments) for of in (route, other)]
    np.testing.assert_allclose(*outs, atol=1e-12)


@pytest.mark.parametrize("remat", ["none", "lean", "full"])
def test_taps_and_a_route_of_all_tokens_change_nothing(remat):
    model, params, arguments = make(remat=remat), random_params(make()), inputs()
    plain = jax.jit(model.apply)(params, *arguments)
    out, tapped = jax.jit(functools.partial(model.apply, taps=(1, 3)))(params, *arguments)
    all_kept = jax.jit(functools.partial(model.apply, route=random_route(TOKENS)))(params, *arguments)
    for other in (out, all_kept):
        np.testing.assert_allclose(other, plain, atol=2e-5)
    assert [tokens.shape for tokens in tapped] == [(3, TOKENS, 32)] * 2
    gradients = [
        jax.jit(jax.grad(lambda p, options=options: (model.apply(p, *arguments, **options) ** 2).sum()))(params)
        for options in ({}, {"route": random_route(TOKENS)})
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), *gradients)


def test_weights_do_not_depend_on_the_route():
    routed, plain = make(), make(method="none")
    assert (routed.kept, plain.kept) == (8, None)
    initial = [jax.jit(model.init)(jax.random.key(0)) for model in (routed, plain)]
    jax.tree.map(np.testing.assert_array_equal, *initial)
    params, arguments = random_params(plain), inputs()
    np.testing.assert_array_equal(*(jax.jit(model.apply)(params, *arguments) for model in (routed, plain)))


def test_flops_are_xlas():
    routed, plain = (make(method=method, scan_unroll=DEPTH, **FOR_FLOPS) for method in ("route", "none"))

    def outputs(variables, x, t, ids):
        return [routed.apply(*variables, x, t, t, route=Route(ids, ids, routed.kept))]

    assert 0.5 < share_of_flops(routed, plain, outputs) < 0.8


# TREAD's own placement, in DiT's table of sizes: a closed form by hand, of this module's FLOPs of a block.
@pytest.mark.parametrize("size, share", [("S", 0.694), ("B", 0.701), ("L", 0.597), ("XL", 0.583)])
def test_flops_of_the_papers_sizes(size, share):
    sizes = {"name": f"DiT-{size}/2", "width": 0, "depth": 0, "heads": 0, "image_shape": (32, 32, 4)}
    model = make(start=2, tail=3, **sizes)
    assert model.step_flops / (3 * model.forward_flops) == pytest.approx(share, abs=0.002)


def test_draws():
    order, inverse = (np.asarray(x) for x in draw_route(jax.random.key(0), 10_000, (4, 4), 6))
    assert order.dtype == inverse.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(TOKENS), order.shape))
    np.testing.assert_array_equal(np.take_along_axis(order, inverse, axis=1), np.broadcast_to(np.arange(TOKENS), order.shape))
    for group in (order[:, :6], order[:, 6:]):
        assert (np.diff(group, axis=1) > 0).all()
    # Each token is seen in 6 of 16 draws, to four standard errors of 10,000.
    seen = np.bincount(order[:, :6].ravel(), minlength=TOKENS) / 10_000
    np.testing.assert_allclose(seen, 6 / 16, atol=4 * np.sqrt(6 / 16 * 10 / 16 / 10_000))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"method": "skip"}, r"tokens\.method 'skip'.*none, route, sprint, mask"),
        ({"start": 0}, r"tokens\.start=0, tokens\.tail=1"),
        ({"start": 4}, r"tokens\.start=4.*of 5"),
        ({"tail": 0}, r"tokens\.tail=0"),
        ({"rate": 1.0}, r"tokens\.rate=1\.0"),
        ({"rate": 0.01}, r"tokens\.rate=0\.01.*16 tokens"),
        ({"name": "DiG-tiny/2"}, r"tokens\.pattern=random is for DiT.*cells"),
        ({"pattern": "rows"}, r"tokens\.pattern 'rows'"),
        ({"pattern": "cells", "rate": 0.3}, r"tokens\.rate=0\.3.*0\.5 and 0\.75"),
        ({"pattern": "cells", "rate": 0.75, "image_shape": (6, 8, 3)}, r"grid of 3 x 4 tokens has no cells of 2 x 2"),
    ],
)
def test_impossible_routes(keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)


def test_a_method_that_is_off_looks_at_nothing():
    assert make(method="none", start=-3, tail=99, rate=7.0).kept is None
