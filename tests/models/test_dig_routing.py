"""DiG on one token of each cell: against a dense network, every pair of tokens written out, that does not see the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routes
from routes import HEADS, inputs, random_params

from speedit_jax.models import layers
from speedit_jax.models.dig import ORDERS, DepthwiseConv, DiGBlock
from speedit_jax.models.routing import CELLS, Route, draw_route

GRID = (4, 4)
EVERYTHING = Route(*(np.tile(np.arange(16, dtype=np.int32), (3, 1)),) * 2, 16, (1, 1))


make = functools.partial(routes.make, name="DiG-tiny/2", depth=6, pattern="cells")


def route_of(model, batch=3):
    return Route(*draw_route(jax.random.key(0), batch, model.grid, model.kept, model.cell), model.kept, model.cell)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rate, cell", CELLS.items())
def test_one_token_of_each_cell(rate, cell):
    grid, kept = (4, 6), round(24 * (1 - rate))
    order, inverse = (np.asarray(x) for x in draw_route(jax.random.key(0), 5000, grid, kept, cell))
    assert order.dtype == inverse.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(24), order.shape))
    np.testing.assert_array_equal(np.take_along_axis(order, inverse, axis=1), np.broadcast_to(np.arange(24), order.shape))
    rows, columns = np.divmod(order[:, :kept], grid[1])
    cells = rows // cell[0] * (grid[1] // cell[1]) + columns // cell[1]
    np.testing.assert_array_equal(cells, np.broadcast_to(np.arange(kept), cells.shape))
    assert (np.diff(order[:, kept:], axis=1) > 0).all()
    # Each token is the one of its cell in 1 - rate of 5,000 draws, to four standard errors.
    seen = np.bincount(order[:, :kept].ravel(), minlength=24) / 5000
    np.testing.assert_allclose(seen, 1 - rate, atol=4 * np.sqrt(rate * (1 - rate) / 5000))


def places(route, grid, order):
    """For each token of `grid` its place in a block's scan, and whether it is seen: [B, T] each."""
    rows, columns = (side // part for side, part in zip(grid, route.cell, strict=True))
    by_columns, reverse = order
    coarse = np.arange(rows * columns).reshape(rows, columns)
    scan = (coarse.T if by_columns else coarse).ravel()  # the cells as they come
    scan = scan[::-1] if reverse else scan
    place = np.empty(rows * columns, int)
    place[scan] = np.arange(rows * columns)
    found, seen = np.zeros(route.order.shape, int), np.zeros(route.order.shape, bool)
    for image, ids in enumerate(np.asarray(route.order)[:, : route.kept]):
        found[image, ids], seen[image, ids] = place, True
    return jnp.asarray(found), jnp.asarray(seen)


def pairwise(place, seen, q, k, v, log_g, reverse=False):
    """o_t = K^-1/2 sum of (q_t exp(G_t - G_s)) k_s v_s over the seen s up to t; G sums the gates of the seen."""
    del reverse  # is in `place`
    before = (place[:, None, :] <= place[:, :, None]) & seen[:, None, :] & seen[:, :, None]  # [B, t, s]
    total = jnp.einsum("bts,bshk->bthk", before.astype(log_g.dtype), log_g)
    decay = jnp.exp(jnp.where(before[..., None, None], total[:, :, None] - total[:, None], 0)) * before[..., None, None]
    weights = jnp.einsum("bthk,btshk,bshk->bhts", q, decay, k)
    return q.shape[-1] ** -0.5 * jnp.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize("rate, start", [(0.5, 1), (0.75, 2)])
def test_against_a_dense_network_that_does_not_look(x64, rate, start):
    """Values and, of one rate, gradients. The route cuts a period, and depth 6 leaves two blocks over, of which it has one."""
    depth, tail = 6, 1
    model = make(rate=rate, depth=depth, start=start, tail=tail)
    params, (x, t, y), route = random_params(model), inputs(), route_of(model)

    def block_params(params, i):
        return jax.tree.map(lambda leaf: leaf[i // 4], params["blocks"][f"block_{i % 4}"]) if i < 4 else params[f"rest_{i - 4}"]

    def dense(params):
        tokens = layers.patchify(x, 2) @ params["patch"]["kernel"] + params["patch"]["bias"]
        tokens = tokens + layers.sincos_position_table(*GRID, 32)
        c = layers.TimestepEmbedder(32, 0, None).apply({"params": params["timestep"]}, t) + params["label"]["table"][y]
        for i in range(depth):
            of = route if start <= i < depth - tail else EVERYTHING
            place, seen = places(of, GRID, ORDERS[4][i % 4])
            look = functools.partial(pairwise, place, seen)
            plain = lambda part, save_products: part  # noqa: E731
            block = DiGBlock(HEADS, GRID, (False, False), "layer", "none", look, None, plain, lambda x, names: x, None)
            own = block_params(params, i)
            out, _ = block.apply({"params": {name: leaf for name, leaf in own.items() if name != "conv"}}, tokens, c)
            tokens = jnp.where(seen[..., None], out, tokens)
            convolved = DepthwiseConv(GRID, "identity", None).apply({"params": own["conv"]}, tokens)
            tokens = jnp.where(seen[..., None], convolved, tokens)
        shift, scale = jnp.split(jax.nn.silu(c) @ params["final_adaLN"]["kernel"].reshape(32, 64), 2, axis=1)
        bias = params["final_adaLN"]["bias"]
        tokens = layers.modulate(layers.layer_norm(tokens), shift + bias[0], scale + bias[1])
        return layers.unpatchify(tokens @ params["final"]["kernel"] + params["final"]["bias"], GRID, 2)

    def routed(params):
        return model.apply(params, x, t, y, route=route)

    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape))

    def value_and_gradient(f):
        def loss(params):
            out = f(params)
            return (out * cotangent).sum(), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        return out, gradient

    if rate == 0.75:
        np.testing.assert_allclose(jax.jit(routed)(params), jax.jit(dense)(params), atol=1e-11)
        return
    (ours, ours_gradient), (expected, gradient) = map(value_and_gradient, (routed, dense))
    np.testing.assert_allclose(ours, expected, atol=1e-12 * float(jnp.abs(expected).max()))
    assert np.abs(ours - jax.jit(model.apply)(params, x, t, y)).max() > 0.01, "the route must matter"
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * scale), ours_gradient, gradient)


def test_the_order_of_those_that_are_seen_matters(x64):
    """Unlike for DiT: a scan over cells in another order is another network."""
    model = make()
    params, arguments, route = random_params(model), inputs(), route_of(model)
    shuffled = route.order[:, [*np.random.default_rng(0).permutation(8), *range(8, 16)]]
    other = Route(shuffled, jnp.argsort(shuffled), 8, route.cell)
    outs = [jax.jit(functools.partial(model.apply, route=of))(params, *arguments) for of in (route, other)]
    assert np.abs(outs[0] - outs[1]).max() > 1e-3


@pytest.mark.parametrize(("directions", "remat"), [(1, "none"), (4, "full")])
def test_a_route_of_all_tokens_changes_nothing(directions, remat):
    """In parts, of which one is a period in a scan, and with remat: the plain network to rounding."""
    model = make(directions=directions, depth=9, start=3, remat=remat)
    params, arguments = random_params(model), inputs()
    plain, routed = (jax.jit(functools.partial(model.apply, **of)) for of in ({}, {"route": EVERYTHING}))
    np.testing.assert_allclose(plain(params, *arguments), routed(params, *arguments), atol=1e-4)


def test_weights_do_not_depend_on_the_route():
    routed, plain = make(), make(method="none")
    assert (routed.kept, routed.cell, plain.kept, plain.cell) == (8, (1, 2), None, None)
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in (routed, plain)]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes[0]) == jax.tree.map(lambda leaf: leaf.shape, shapes[1])


@pytest.mark.slow
@pytest.mark.parametrize("rate", CELLS)
def test_flops_are_xlas(rate):
    """Of a forward pass. XLA counts norms, activations and GLA's loop over chunks otherwise, which are little here."""
    sizes = {"image_shape": (32, 32, 4), "width": 128, "depth": 7, "scan_unroll": 1, "start": 1}
    counted = {}
    for method in ("none", "route"):
        model = make(rate=rate, method=method, **sizes)
        params = jax.eval_shape(model.init, jax.random.key(0))
        x, t = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
        ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

        def forward(params, x, t, order, model=model, method=method):
            options = {} if method == "none" else {"route": Route(order, order, model.kept, model.cell)}
            return model.apply(params, x, t, t, **options)

        counted[method] = jax.jit(forward).lower(params, x, t, ids).cost_analysis()["flops"], model.step_flops
    ratios = [counted["route"][i] / counted["none"][i] for i in (0, 1)]
    assert 0.3 < ratios[1] < 0.8
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)
