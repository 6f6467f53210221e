"""The networks: sizes, what they are at initialisation, and what must not change their outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.models.build import build, parse_name


@functools.cache
def make(image_shape=(8, 8, 3), num_classes=5, learned_variance=True, platform="cpu", **keys):
    config = get_config().model
    config.update({"name": "DiT-tiny/2", "width": 32, "depth": 2, "heads": 2} | keys)
    return build(config, image_shape=image_shape, num_classes=num_classes, learned_variance=learned_variance, platform=platform)


# What DiT may have besides the published parts, each of them alone and all together.
PARTS = ({"rope": True}, {"mlp": "swiglu"}, {"norm": "rms"}, {"patch_bottleneck": 4})
PIXELS = {key: value for part in PARTS for key, value in part.items()}


def initial(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed))


def trained(model):
    """Parameters away from initialisation, where all gates are open."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), initial(model))


def inputs(model, batch=4):
    x = np.random.default_rng(1).standard_normal((batch, *model.image_shape), np.float32)
    return x, np.arange(batch) * 150, np.arange(batch) % max(1, model.num_classes)


def run(model, params, x, t, y):
    return np.asarray(jax.jit(model.apply)(params, x, t, y))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("DiT-S/2", 32_865_056),
        ("DiT-S/4", 32_920_448),
        ("DiT-S/8", 33_142_016),
        ("DiT-B/2", 130_315_808),
        ("DiT-L/2", 457_840_672),
        ("DiT-XL/2", 674_834_720),
        ("DiG-S/2", 32_983_328),
        ("DiG-B/2", 130_551_584),
        ("DiG-L/2", 464_760_352),
        ("DiG-XL/2", 675_659_040),
    ],
)
def test_parameters_of_the_papers_models(name, parameters):
    model = make((32, 32, 4), 1000, name=name, width=0, depth=0, heads=0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"image_shape": (4, 12, 1), "name": "DiT-tiny/4", "learned_variance": False},
        {"image_shape": (6, 2, 4), "name": "DiT-tiny/1", "num_classes": 0},
        {"image_shape": (16, 16, 3), "name": "DiT-tiny/16", **PIXELS},
    ],
)
def test_at_initialisation_the_output_is_zero(keys):
    model = make(**keys)
    out = run(model, initial(model), *inputs(model))
    height, width, channels = model.image_shape
    assert out.shape == (4, height, width, channels * (2 if keys.get("learned_variance", True) else 1))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, 0)


def test_every_block_is_the_identity_at_initialisation():
    """adaLN-Zero: with the last layer opened, the blocks' weights do not matter."""
    model = make()
    params = initial(model)
    params |= {name: trained(model)[name] for name in ("final", "final_adaLN")}
    other = initial(model, 7)["blocks"]
    assert (other["mlp"]["up"]["kernel"] != params["blocks"]["mlp"]["up"]["kernel"]).any()
    out = run(model, params, *inputs(model))
    assert np.abs(out).max() > 0.1
    np.testing.assert_array_equal(run(model, params | {"blocks": other}, *inputs(model)), out)


def test_layers_are_initialised_apart():
    kernel = initial(make())["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == 2
    assert len({layer.tobytes() for layer in np.asarray(kernel)}) == 2


def test_initialisation_is_a_function_of_the_key():
    first, again, other = (initial(make(), seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["patch"]["kernel"] != other["patch"]["kernel"]).any()


@pytest.mark.parametrize("keys", [{}, PIXELS], ids=["published", "pixels"])
def test_every_parameter_is_used_and_every_axis_named(keys):
    model = make(**keys)
    params = trained(model)
    gradients = jax.jit(jax.grad(lambda p: (model.apply(p, *inputs(model, 6)) ** 2).sum()))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        if "qkv" in jax.tree_util.keystr(path) and gradient.ndim == 4:
            gradient = gradient[:, [0, 2]]  # a constant added to all keys changes no softmax
        elif "label" in jax.tree_util.keystr(path):
            gradient = gradient[:5]  # nobody had the null label
        assert (np.abs(gradient).max(axis=-1) > 0).all(), path
    names = jax.tree.map(len, model.axes, is_leaf=lambda x: isinstance(x, tuple))
    assert names == jax.tree.map(jnp.ndim, params)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_image_depends_on_its_own_inputs_alone(which):
    model = make()
    params, args = trained(model), inputs(model)
    out = run(model, params, *args)
    changed = [np.array(a) for a in args]
    changed[which][1] += 1
    difference = np.abs(run(model, params, *changed) - out).max(axis=(1, 2, 3))
    assert difference[1] > 1e-3
    np.testing.assert_array_equal(difference[[0, 2, 3]], 0)


def test_the_shift_of_the_frequencies_matters_but_at_time_zero():
    model, shifted = make(), make(time_freq_shift=1)
    params, (x, _, y) = trained(model), inputs(model)
    for t, differs in ((0, False), (500, True)):
        outs = [run(m, params, x, np.full(4, t), y) for m in (model, shifted)]
        assert (np.abs(outs[1] - outs[0]).max() > 0.01) == differs


def test_positions_matter():
    """Without them, shuffling the patches would only shuffle the output."""
    model = make()
    params, (x, t, y) = trained(model), inputs(model)
    rolled = run(model, params, np.roll(x, 2, axis=1), t, y)
    assert np.abs(np.roll(rolled, -2, axis=1) - run(model, params, x, t, y)).max() > 0.01


def test_the_null_label_is_one_more_row():
    model = make()
    assert model.null_label == 5
    params, (x, t, _) = trained(model), inputs(model)
    assert params["label"]["table"].shape == (6, 32)
    outs = [run(model, params, x, t, np.full(4, label)) for label in range(6)]
    assert len({out.tobytes() for out in outs}) == 6


def test_without_dropout_there_is_no_null_label():
    model = make(num_classes=5, label_dropout=0.0)
    assert model.null_label is None
    assert jax.eval_shape(model.init, jax.random.key(0))["label"]["table"].shape == (5, 32)


def test_an_unconditional_model_ignores_the_label():
    model = make(num_classes=0)
    assert model.null_label is None
    params, (x, t, y) = trained(model), inputs(model)
    assert "label" not in params
    np.testing.assert_array_equal(run(model, params, x, t, y), run(model, params, x, t, y + 3))


@functools.cache
def outputs_and_gradients(**keys):
    model = make(**keys)

    def loss(params):
        out = model.apply(params, *inputs(model))
        return (out**2).mean(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(trained(model))
    return jax.tree.map(np.asarray, {"out": out, "gradients": gradients})


# A period of two unlike blocks and one that is left over.
DIG = {"name": "DiG-tiny/2", "directions": 2, "depth": 3}


@pytest.mark.parametrize("name", [{}, PIXELS, DIG], ids=["DiT", "pixels", "DiG"])
@pytest.mark.parametrize("keys", [{"remat": "lean"}, {"remat": "full"}, {"scan_unroll": 2}], ids=str)
def test_how_it_is_computed_changes_nothing(name, keys):
    def close(a, b):
        # Another order of float32 sums of a few hundred terms: 100 units in the last place of the largest entry.
        np.testing.assert_allclose(a, b, atol=100 * 2**-24 * np.abs(b).max())

    jax.tree.map(close, outputs_and_gradients(**name, **keys), outputs_and_gradients(**name))


@pytest.mark.parametrize("name, most", [("DiT-tiny/2", 0.4), pytest.param("DiG-tiny/2", 0.75, marks=pytest.mark.slow)])
def test_remat_saves_memory(name, most):
    """Temporaries of a gradient under the scan over layers, at 1,024 tokens, of which DiT's logits are the most."""

    def temporaries(remat):
        model = make(image_shape=(64, 64, 4), name=name, width=0, depth=8, heads=0, remat=remat, dtype="float32")
        params = jax.eval_shape(model.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        gradient = jax.jit(jax.grad(lambda *args: (model.apply(*args) ** 2).mean()))
        return gradient.lower(params, x, t, t).compile().memory_analysis().temp_size_in_bytes

    none, lean, full = map(temporaries, ("none", "lean", "full"))
    assert full < lean < most * none


def test_bfloat16_rounds_activations_and_not_parameters():
    model = make(dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))} == {jnp.dtype("float32")}
    expected, got = outputs_and_gradients(), outputs_and_gradients(dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(got)} == {np.dtype("float32")}

    def close(a, b):
        # About twenty roundings of at most 2^-9 from one end to the other, were they all to add up.
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 20 * 2**-9

    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_dtype(platform, dtype):
    assert make(platform=platform).dtype == dtype


@pytest.mark.parametrize("name, parsed", [("DiT-tiny/1", ("DiT", "tiny", 1)), ("DiG-XL/8", ("DiG", "XL", 8))])
def test_names(name, parsed):
    assert parse_name(name) == parsed


@pytest.mark.parametrize(
    "keys, message",
    [
        *[({"name": name}, rf"model\.name '{name}'") for name in ("DiT-M/2", "DiT-S/3", "DiT-S", "S/2", "DiT-S/02", "")],
        ({"name": "DiT-tiny/8", "image_shape": (8, 12, 3)}, r"model\.name='DiT-tiny/8'.*multiples of 8, not 8x12"),
        ({"width": 36, "heads": 5}, "model width 36 .* 5 heads"),
        ({"width": 30, "heads": 2}, "model width 30 with 2 heads"),
        ({"time_freq_shift": 2}, r"model\.time_freq_shift 2.*0, 1"),
        ({"remat": "some"}, r"model\.remat 'some'.*none, lean, full"),
        ({"dtype": "float16"}, r"model\.dtype 'float16'.*auto, float32, bfloat16"),
        ({"scan_unroll": 0}, r"model\.scan_unroll=0.*1\.\.2"),
        ({"scan_unroll": 3}, r"model\.scan_unroll=3.*1\.\.2"),
        ({"label_dropout": 1.0}, r"model\.label_dropout=1\.0"),
        ({"label_dropout": -0.1}, r"model\.label_dropout=-0\.1"),
        ({"attention": "flash"}, r"model\.attention 'flash'"),
        ({"attention": "chunkd", "name": "DiG-tiny/2"}, r"model\.attention 'chunkd'.*chunked"),
        ({"attention": "pallas"}, r"model\.attention=pallas"),
        ({"mlp_ratio": 0.0}, r"model\.mlp_ratio=0\.0"),
        ({"mlp_ratio": 1e-4}, r"model\.mlp_ratio=0\.0001: leaves nothing"),
        ({"heads": -2}, r"model\.heads=-2"),
        ({"mlp": "relu"}, r"model\.mlp 'relu'.*gelu, swiglu"),
        ({"norm": "batch"}, r"model\.norm 'batch'.*layer, rms"),
        ({"rope": True, "width": 36, "heads": 6}, r"model\.rope wants .* multiple of 4, not 6"),
        ({"rope": True, "name": "DiG-tiny/2"}, r"model\.rope .* for DiT"),
        ({"patch_bottleneck": -1}, r"model\.patch_bottleneck=-1"),
    ],
)
def test_user_errors_name_the_key(keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)


# GFLOPs of the DiT paper (arXiv 2212.09748, table 4), which counts a multiplication and an addition as one.
@pytest.mark.parametrize(
    "name, gflops", [("DiT-S/2", 6.06), ("DiT-S/8", 0.36), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64)]
)
def test_flops_are_the_papers(name, gflops):
    model = make((32, 32, 4), 1000, name=name, width=0, depth=0, heads=0)
    assert model.forward_flops / 2e9 == pytest.approx(gflops, rel=0.02)


@pytest.mark.parametrize("keys", PARTS, ids=str)
def test_a_part_alone_is_another_network(keys):
    """The parts that it shares with the published one at the same weights."""
    model, plain = make(**keys), make()
    params, published = trained(model), trained(plain)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, published)]
    assert (shapes[0] == shapes[1]) == ("rope" in keys)
    for path, leaf in jax.tree_util.tree_leaves_with_path(published):
        where = params
        for key in path[:-1]:
            where = where.get(key.key, {})
        if where.get(path[-1].key, leaf[:0]).shape == leaf.shape:
            where[path[-1].key] = leaf
    out, expected = run(model, params, *inputs(model)), run(plain, published, *inputs(plain))
    assert out.shape == expected.shape and np.abs(out - expected).max() > 0.01


def test_a_bottleneck_of_full_rank_is_a_plain_patch():
    model, plain = make(patch_bottleneck=12), make()  # 2 x 2 x 3 numbers
    params = trained(plain)
    wide = params | {"patch_bottleneck": {"kernel": np.eye(12, dtype=np.float32)}}
    np.testing.assert_array_equal(run(model, wide, *inputs(model)), run(plain, params, *inputs(plain)))


def test_swiglu_has_as_many_weights():
    sizes = [
        sum(x.size for x in jax.tree.leaves(initial(make(width=48, mlp=mlp))["blocks"]["mlp"])) for mlp in ("gelu", "swiglu")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_flops_are_xlas(name):
    """XLA counts norms and activations too, and a loop once: one layer, so wide that products are nearly all."""
    model = make((16, 16, 4), name=name, width=256, depth=1, heads=2, gla="reference")
    params = jax.eval_shape(model.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    counted = jax.jit(model.apply).lower(params, x, t, t).cost_analysis()["flops"]
    assert model.forward_flops == pytest.approx(counted, rel=0.08)


def test_with_qk_norm_logits_do_not_grow_with_the_weights():
    changed = {}
    for qk_norm in (True, False):
        model = make(qk_norm=qk_norm)
        params = trained(model)
        before = run(model, params, *inputs(model))

        def grown(path, leaf):
            # Kernels [L, D, 3, H, K] and biases [L, 3, H, K], queries and keys first.
            return leaf.at[..., :2, :, :].multiply(30) if "qkv" in jax.tree_util.keystr(path) else leaf

        params = jax.tree_util.tree_map_with_path(grown, params)
        changed[qk_norm] = np.abs(run(model, params, *inputs(model)) - before).max() / np.abs(before).max()
    assert changed[True] < 1e-4 < 1e-2 < changed[False]
