"""What text does to the networks: padding and its order change nothing, the last kernel of cross-attention starts at zero."""

import functools

import jax
import numpy as np
import pytest

from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.models.attention import chunked_attention, softmax_attention
from speedit_jax.models.build import build
from speedit_jax.models.condition import TextShape, padded

IMAGE, WIDTH, BATCH = (8, 8, 3), 16, 4
LENGTHS = np.array([1, 5, 9, 16], np.int32)
RNG = np.random.default_rng(0)
WORDS = RNG.normal(size=(BATCH, 16, WIDTH)).astype(np.float16)
X, T = RNG.normal(size=(BATCH, *IMAGE)).astype(np.float32), np.array([0, 10, 500, 999])


@functools.cache
def model(length=16, pooled=False, **keys):
    config = get_config("DiT-tiny/2").model
    config.update({"width": 32, "depth": 2, "heads": 4} | keys)
    text = TextShape(WIDTH, length, pooled)
    return build(config, image_shape=IMAGE, num_classes=0, learned_variance=False, platform="cpu", text=text)


@functools.cache
def weights(**keys):
    """Nowhere zero, so that text is at work."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model(**keys).init, jax.random.key(0))
    return jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def output(tokens, lengths=LENGTHS, length=16, params=None, **keys):
    of = model(length, **keys)
    y = padded(tokens, lengths, of.text)
    return np.asarray(jax.jit(of.apply)(weights(**keys) if params is None else params, X, T, y))


KINDS = {
    "DiT": {},
    "DiT, single": {"adaln": "single"},
    "DiT, chunked": {"attention": "chunked"},
    "DiT, pooled": {"text": "pooled"},
    "DiG": {"name": "DiG-tiny/2", "depth": 4},
    "DiG, full remat": {"name": "DiG-tiny/2", "remat": "full", "directions": 2},
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_padding_is_not_looked_at(keys):
    plain = output(WORDS, **keys)
    # More of it: sums in another order, so a few roundings of 6e-8 of numbers of order one.
    assert np.abs(output(WORDS, length=32, **keys) - plain).max() < 1e-6 * np.abs(plain).max()
    # And another one: to the bit.
    beyond = np.arange(16) >= LENGTHS[:, None]
    for other in (np.where(beyond[..., None], WORDS[:, ::-1], WORDS), np.where(beyond[..., None], np.float16(1e4), WORDS)):
        assert not np.array_equal(other, WORDS)
        np.testing.assert_array_equal(output(other, **keys), plain)
    # What is not padding counts.
    assert np.abs(output(np.where(beyond[..., None], WORDS, -WORDS), **keys) - plain).max(axis=(1, 2, 3)).min() > 1e-3


def test_the_order_of_tokens_is_the_encoders_business():
    turned = np.stack([np.concatenate([row[:n][::-1], row[n:]]) for row, n in zip(WORDS, LENGTHS, strict=True)])
    plain = output(WORDS)
    assert np.abs(output(turned) - plain).max() < 1e-5 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["DiT-tiny/2", "DiG-tiny/2"])
def test_at_the_start_text_has_no_effect(name):
    """With any last layer: its own zeros would hide everything."""
    keys = {"name": name, "directions": 1}
    start = model(**keys).init(jax.random.key(0))
    cross = start["blocks"]["cross"]
    assert not np.any(cross["out"]["kernel"]) and np.any(cross["q"]["kernel"]) and np.any(cross["kv"]["kernel"])
    params = weights(**keys)
    params = jax.tree_util.tree_map_with_path(
        lambda path, random, first: first if "cross/out" in jax.tree_util.keystr(path, simple=True, separator="/") else random,
        params,
        start,
    )
    np.testing.assert_array_equal(output(WORDS, params=params, **keys), output(-WORDS, params=params, **keys))


def test_cross_attention_is_what_its_formula_says():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(BATCH, n, 2, 8)) for n in (300, 16, 16))
    wanted = np.zeros_like(q)
    for b, n in enumerate(LENGTHS):
        logits = np.exp(np.einsum("thk,shk->hts", q[b], k[b, :n]) / 8**0.5)
        wanted[b] = np.einsum("hts,shk->thk", logits / logits.sum(axis=-1, keepdims=True), v[b, :n])
    with jax.enable_x64(True):
        for implementation in (softmax_attention, chunked_attention):  # 300 queries: one chunk and a part
            np.testing.assert_allclose(implementation(q, k, v, LENGTHS), wanted, rtol=1e-12, atol=1e-14)


def test_pooled_text_is_its_mean():
    mean = np.stack([row[:n].astype(np.float32).mean(axis=0) for row, n in zip(WORDS, LENGTHS, strict=True)])
    assert not np.array_equal(mean, mean.astype(np.float16))
    one = {"tokens": mean[:, None], "length": np.ones(BATCH, np.int32)}
    params = weights(text="pooled")
    pooled = np.asarray(jax.jit(model(1, True, text="pooled").apply)(params, X, T, one))
    np.testing.assert_allclose(output(WORDS, text="pooled"), pooled, atol=1e-6 * np.abs(pooled).max())


def test_adaln_single_by_its_formula():
    """A depth of one, so that the block's part can be told from the output: DiT's with the same modulation."""
    rng = np.random.default_rng(3)
    keys = {"depth": 1, "text": "pooled"}
    single, block = weights(adaln="single", **keys), jax.tree.map(np.copy, weights(**keys))
    shared = {name: block[name] for name in ("patch", "timestep", "text", "final")}
    shared |= {"blocks": {name: block["blocks"][name] for name in ("attention", "mlp")}}
    single = jax.tree.map(np.copy, single) | shared | {"blocks": single["blocks"] | shared["blocks"]}
    # W SiLU(c) + b + table in DiT's layer: b takes the table.
    block["blocks"]["adaLN"] = {
        "kernel": single["adaLN_single"]["kernel"][None],
        "bias": single["adaLN_single"]["bias"][None] + single["blocks"]["adaLN_table"],
    }
    # The last one adds c itself; here its own layer adds nothing, and neither does c, of a zero embedding.
    for params in (single, block):
        for name in ("text", "timestep"):
            params[name] = params[name] | {"out": jax.tree.map(np.zeros_like, params[name]["out"])}
    table = rng.normal(size=(2, 32)).astype(np.float32)
    single["final_table"] = table
    block["final_adaLN"] = {"kernel": np.zeros((32, 2, 32), np.float32), "bias": table}
    ours, wanted = output(WORDS, params=single, adaln="single", **keys), output(WORDS, params=block, **keys)
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_sizes():
    """PixArt-alpha's 610,856,096 parameters, and those of other sizes as docs/text.md has them."""

    def count(name, width, **keys):
        config = get_config(name).model
        config.update(keys)
        text = TextShape(width, 120)
        of = build(config, image_shape=(32, 32, 4), num_classes=0, learned_variance=True, platform="cpu", text=text)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(of.init, jax.random.key(0))))

    assert count("DiT-XL/2", 4096, adaln="single") == 610_856_096
    assert round(count("DiT-XL/2", 384) / 1e6, 1) == 824.2


def test_positions_are_divided():
    keys = {"text": "pooled", "position_scale": 2.0}
    assert np.abs(output(WORDS, **keys, params=weights(text="pooled")) - output(WORDS, text="pooled")).max() > 1e-2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"text": "crossed"}, "choose one of cross, pooled"),
        ({"adaln": "multi"}, "choose one of block, single"),
        ({"position_scale": 0.0}, "must be positive"),
        ({"pooled": True, "length": 1}, "use pooled"),
    ],
)
def test_what_cannot_be(keys, words):
    with pytest.raises(UserError, match=words):
        model(**keys)


def test_flops_are_those_that_xla_counts():
    """One layer, so that XLA counts its loop whole; the rest, norms and softmax, is a few per cent."""
    for keys in ({}, {"text": "pooled"}, {"adaln": "single"}):
        of = model(depth=1, width=64, **keys)
        params = jax.eval_shape(of.init, jax.random.key(0))
        x, t = jax.ShapeDtypeStruct((1, *IMAGE), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
        counted = jax.jit(of.apply).lower(params, x, t, of.conditions(1)).cost_analysis()["flops"]
        assert of.forward_flops == pytest.approx(counted, rel=0.1), keys
