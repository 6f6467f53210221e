"""SPRINT's network: against one written out, and what the fusion does not let through."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routes
from routes import FOR_FLOPS, HEADS, inputs, random_params, share_of_flops

from speedit_jax.errors import UserError
from speedit_jax.models.layers import sincos_position_table, timestep_features
from speedit_jax.models.routing import Route, draw_route
from speedit_jax.models.sprint import Fusion

DEPTH, TOKENS, WIDTH = 5, 16, 32
DROPPED = np.array([False, True, False])

make = functools.partial(routes.make, name="DiT-tiny/2", method="sprint", depth=DEPTH)


def route_of(model, batch=3):
    return Route(*draw_route(jax.random.key(0), batch, model.grid, model.kept, model.cell), model.kept, model.cell)


def linear(x, of):
    return x @ of["kernel"].reshape(x.shape[-1], -1) + of["bias"].ravel()


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def block(params, x, c, seen):
    """A DiT block whose tokens look at those that are `seen`, [B, T] bool."""
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(linear(jax.nn.silu(c), params["adaLN"])[:, None], 6, axis=-1)
    y = normed(x) * (1 + scale1) + shift1
    q, k, v = jnp.moveaxis(linear(y, params["attention"]["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(WIDTH / HEADS)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf))
    x = x + gate1 * linear(jnp.einsum("bhts,bshk->bthk", weights, v).reshape(x.shape), params["attention"]["out"])
    y = normed(x) * (1 + scale2) + shift2
    return x + gate2 * linear(jax.nn.gelu(linear(y, params["mlp"]["up"])), params["mlp"]["down"])


def written_out(params, x, t, y, seen, dropped):
    """The network on all tokens: g's are chosen afterwards, token by token, and those that are not `seen` are not looked at."""
    patches = x.reshape(len(x), 4, 2, 4, 2, 3).swapaxes(2, 3).reshape(len(x), TOKENS, -1)
    tokens = linear(patches, params["patch"]) + sincos_position_table(4, 4, WIDTH)
    c = linear(timestep_features(t), params["timestep"]["hidden"])
    c = linear(jax.nn.silu(c), params["timestep"]["out"]) + params["label"]["table"][y]
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(DEPTH)]
    everything = jnp.ones((len(x), TOKENS), bool)

    before = block(blocks[0], tokens, c, everything)
    middle = before
    for of_block in blocks[1:-1]:
        middle = block(of_block, middle, c, seen)
    padded = jnp.where((seen & ~dropped[:, None])[..., None], middle, params["sprint"]["mask"])
    weights = params["sprint"]["fusion"]["kernel"]
    fused = padded @ weights[:WIDTH] + before @ weights[WIDTH:] + params["sprint"]["fusion"]["bias"]
    tokens = block(blocks[-1], fused, c, everything)
    shift, scale = jnp.split(linear(jax.nn.silu(c), params["final_adaLN"])[:, None], 2, axis=-1)
    out = linear(normed(tokens) * (1 + scale) + shift, params["final"])
    return out.reshape(len(x), 4, 4, 2, 2, 3).swapaxes(2, 3).reshape(x.shape)


@pytest.mark.slow
def test_against_a_network_that_is_written_out():
    """Values and gradients, with a route and a dropped path."""
    with jax.enable_x64(True):
        model = make()
        params, (x, t, y), route = random_params(model), inputs(), route_of(model)
        seen = jnp.zeros((3, TOKENS), bool).at[jnp.arange(3)[:, None], route.order[:, : model.kept]].set(True)
        cotangent = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape))

        def value_and_gradient(apply):
            def loss(params):
                out = apply(params)
                return (out * cotangent).sum(), out

            return jax.jit(jax.grad(loss, has_aux=True))(params)

        gradient, out = value_and_gradient(lambda p: model.apply(p, x, t, y, route=route, dropped=jnp.asarray(DROPPED)))
        reference, expected = value_and_gradient(lambda p: written_out(p, x, t, y, seen, jnp.asarray(DROPPED)))
        np.testing.assert_allclose(out, expected, atol=1e-12 * float(jnp.abs(expected).max()))
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * scale), gradient, reference)


def test_the_fusion_token_by_token():
    """Of whatever backbone: the mask token is where a route's tokens are not, and everywhere in a dropped image."""
    rng = np.random.default_rng(0)
    route = Route(*draw_route(jax.random.key(1), 3, (2, 4), 4, (1, 2)), 4, (1, 2))
    before, seen = rng.standard_normal((3, 8, 6)).astype(np.float32), rng.standard_normal((3, 4, 6)).astype(np.float32)
    fusion = {"kernel": rng.standard_normal((12, 6)).astype(np.float32), "bias": rng.standard_normal(6).astype(np.float32)}
    mask = rng.standard_normal(6).astype(np.float32)
    out = Fusion(jnp.float32).apply({"params": {"mask": mask, "fusion": fusion}}, before, seen, route, jnp.asarray(DROPPED))
    for image in range(3):
        ids = list(np.asarray(route.order)[image, :4])
        for token in range(8):
            own = seen[image, ids.index(token)] if token in ids and not DROPPED[image] else mask
            expected = np.concatenate([own, before[image, token]]) @ fusion["kernel"] + fusion["bias"]
            np.testing.assert_allclose(out[image, token], expected, atol=1e-5)


def test_the_first_fusion_is_what_the_middle_blocks_return():
    """To the bit, where they see all tokens."""
    before, seen = np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float32)
    params = jax.jit(Fusion(jnp.float32).init)(jax.random.key(0), before, seen, None, None)
    out = jax.jit(Fusion(jnp.float32).apply)(nn.meta.unbox(params), before, seen, None, None)
    np.testing.assert_array_equal(out, seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_it_begins_as_the_plain_network_to_the_bit(name):
    """With its initial parameters. Operation by operation: compiled, the two are different programs."""
    fused, plain = (make(name=name, depth=3, rate=0, method=method) for method in ("sprint", "none"))
    initial, of_plain = (jax.jit(model.init)(jax.random.key(0)) for model in (fused, plain))
    sprint = initial.pop("sprint")
    jax.tree.map(np.testing.assert_array_equal, initial, of_plain)
    params, (x, t, y) = random_params(plain), inputs()
    with jax.disable_jit():
        out, expected = fused.apply(params | {"sprint": sprint}, x, t, y), plain.apply(params, x, t, y)
    assert np.asarray(out).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.slow
def test_what_a_dropped_image_does_not_depend_on():
    """The middle blocks have no gradient of it, exactly, and the mask token none of images that keep all tokens."""
    model = make(rate=0)
    params, (x, t, y) = random_params(model), inputs()

    @jax.jit
    def gradient(params, dropped):
        return jax.grad(lambda p: (model.apply(p, x, t, y, dropped=dropped) ** 2).sum())(params)

    of_dropped, of_others = (gradient(params, np.full(3, dropped)) for dropped in (True, False))
    for leaf in jax.tree.leaves(of_dropped["blocks"]):
        assert not np.asarray(leaf[1:-1]).any() and np.asarray(leaf[0]).any() and np.asarray(leaf[-1]).any()
    assert np.asarray(of_dropped["sprint"]["mask"]).all() and not np.asarray(of_others["sprint"]["mask"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_dig_on_cells(remat):
    """With all tokens and the first fusion it is DiG; a route and a dropped path change it, and it learns from both."""
    fused, plain = (
        make(name="DiG-tiny/2", pattern="cells", depth=6, method=method, remat=remat) for method in ("sprint", "none")
    )
    params, (x, t, y), route = random_params(plain), inputs(), route_of(fused)
    params |= {"sprint": jax.jit(fused.init)(jax.random.key(0))["sprint"]}
    outs = [
        jax.jit(functools.partial(model.apply, **options))(params, x, t, y)
        for model, options in ((plain, {}), (fused, {}), (fused, {"route": route}), (fused, {"dropped": DROPPED}))
    ]
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-4)
    np.testing.assert_allclose(outs[3][~DROPPED], outs[0][~DROPPED], atol=1e-4)
    assert np.abs(outs[3] - outs[0])[DROPPED].max() > 0.01 and np.abs(outs[2] - outs[0]).max() > 0.01
    gradient = jax.jit(jax.grad(lambda p: (fused.apply(p, x, t, y, route=route, dropped=DROPPED) ** 2).sum()))(params)
    assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_flops_are_xlas():
    fused, plain = (make(method=method, rate=0.75, scan_unroll=DEPTH, **FOR_FLOPS) for method in ("sprint", "none"))

    def outputs(variables, x, t, ids):
        return [fused.apply(*variables, x, t, t, route=Route(ids, ids, fused.kept), dropped=t > 500)]

    assert 0.4 < share_of_flops(fused, plain, outputs) < 0.7


# The paper's placement and rate in DiT's table of sizes, relative to plain DiT: a closed form by hand.
@pytest.mark.parametrize("size, share", [("S", 0.501), ("XL", 0.358)])
def test_flops_of_the_papers_sizes(size, share):
    sizes = {"name": f"DiT-{size}/2", "width": 0, "depth": 0, "heads": 0, "image_shape": (32, 32, 4)}
    fused, plain = make(start=2, tail=2, rate=0.75, pattern="cells", **sizes), make(method="none", **sizes)
    assert fused.step_flops / plain.step_flops == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"rate": 1.0}, r"tokens\.rate=1\.0"),
        ({"rate": 0, "start": 4}, r"tokens\.start=4.*of 5"),
        ({"path_drop": 1.0}, r"tokens\.path_drop=1\.0: must lie in \[0, 1\)"),
        ({"path_drop": -0.1}, r"tokens\.path_drop=-0\.1"),
        ({"method": "route", "rate": 0}, r"tokens\.rate=0\.0: must be between 0 and 1"),
    ],
)
def test_impossible_settings(keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)
