"""Embeddings and patches, one position at a time."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.models import dig, dit, layers


@pytest.mark.parametrize("height, width, dim", [(1, 1, 4), (4, 4, 16), (3, 5, 24), (16, 16, 384)])
def test_position_table(height, width, dim):
    table = layers.sincos_position_table(height, width, dim)
    assert table.shape == (height * width, dim)
    quarter = dim // 4
    for row in range(height):
        for column in range(width):
            parts = table[row * width + column].reshape(4, quarter)
            for j in {0, quarter // 2, quarter - 1}:
                w = 10_000 ** (-j / quarter)
                expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
                np.testing.assert_allclose(parts[:, j], expected, atol=1e-12)
    assert len(np.unique(table.round(6), axis=0)) == height * width


def test_rotary_logits_depend_on_differences_of_positions():
    """In float64: moving query and key by the same rows and columns changes no logit; moving one of them does."""
    with jax.enable_x64(True):
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 12))

        def logits(at, to):
            table = layers.rope_angles((9, 7), 12).reshape(9, 7, 6)
            turned = [layers.rotate(x, jnp.asarray(table[place])[None]) for x, place in ((q, at), (k, to))]
            return np.asarray((turned[0] * turned[1]).sum(-1))

        first = logits((1, 2), (4, 3))
        np.testing.assert_allclose(logits((5, 5), (8, 6)), first, atol=1e-13)
        for other in ((4, 4), (5, 3), (3, 4)):
            assert np.abs(logits((1, 2), other) - first).max() > 1e-2
        np.testing.assert_array_equal(layers.rotate(q, jnp.zeros((1, 6))), q)


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features(shift):
    t = np.array([0, 1, 17, 999])
    features = layers.timestep_features(jnp.asarray(t), shift=shift)
    assert features.shape == (4, 256)
    assert features.dtype == jnp.float32
    for i, step in enumerate(t):
        for j in (0, 1, 64, 127):
            angle = step * 10_000 ** (-j / (128 - shift))
            # The angle, up to 999, is rounded to float32 twice.
            np.testing.assert_allclose(features[i, [j, 128 + j]], [math.cos(angle), math.sin(angle)], atol=2 * 999 * 2**-24)


def test_timestep_features_tell_all_steps_apart():
    features = np.asarray(layers.timestep_features(jnp.arange(1000)))
    distances = np.linalg.norm(features[:, None, ::16] - features[None, :, ::16], axis=-1) + np.eye(1000)
    assert distances.min() > 0.01


@pytest.mark.parametrize("height, width, channels, patch", [(8, 8, 3, 2), (4, 12, 1, 4), (6, 2, 4, 1), (8, 16, 4, 8)])
def test_patches(height, width, channels, patch):
    x = np.random.default_rng(0).standard_normal((2, height, width, channels)).astype(np.float32)
    tokens = np.asarray(layers.patchify(jnp.asarray(x), patch))
    grid = (height // patch, width // patch)
    assert tokens.shape == (2, grid[0] * grid[1], patch * patch * channels)
    for row in range(grid[0]):
        for column in range(grid[1]):
            cut = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            np.testing.assert_array_equal(tokens[:, row * grid[1] + column], cut.reshape(2, -1))
    np.testing.assert_array_equal(layers.unpatchify(jnp.asarray(tokens), grid, patch), x)


def test_layer_norm_has_float32_statistics():
    x = np.random.default_rng(0).standard_normal((2, 3, 64)) * 3 + 100
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    # An offset of 100 leaves float32 about five digits.
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)
    half = jnp.asarray(x, jnp.bfloat16)
    normed = layers.layer_norm(half)
    assert normed.dtype == jnp.bfloat16
    expected = layers.layer_norm(half.astype(jnp.float32))
    # Only the result is rounded: half a unit of bfloat16's last place.
    np.testing.assert_allclose(normed.astype(jnp.float32), expected, rtol=2**-8)


def test_modulate():
    x, shift, scale = jnp.ones((2, 3, 4)), jnp.array([[1.0] * 4, [2.0] * 4]), jnp.array([[0.0] * 4, [5.0] * 4])
    np.testing.assert_array_equal(layers.modulate(x, shift, scale), np.stack([np.full((3, 4), 2.0), np.full((3, 4), 8.0)]))


def test_label_embedding_is_a_row_of_the_table():
    embedder = layers.LabelEmbedder(11, 8, jnp.bfloat16)
    params = embedder.init(jax.random.key(0), jnp.zeros(1, int))
    table = params["params"]["table"].value
    assert table.shape == (11, 8)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.4)  # 88 draws: five standard deviations
    out = embedder.apply(params, jnp.array([3, 10]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, table[jnp.array([3, 10])].astype(jnp.bfloat16))


# Each with the shapes of its inputs.
RECOMPUTED = {
    "norm": (layers.modulated_layer_norm, [(2, 5, 24), (2, 24), (2, 24)]),
    "rms": (layers._rms_norm, [(2, 5, 3, 8), (8,)]),
    "gate": (dig._log_gate, [(2, 5, 3, 8)]),
    "swish": (dig._swish_times, [(2, 5, 3, 8), (2, 5, 3, 8)]),
    "swiglu": (layers._swiglu, [(2, 5, 2, 24)]),
    "convolution": (dig._shifted_products, [(2, 4, 6, 24), (3, 3, 24), (24,)]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed(name):
    """The values and gradients of the plain formula, of which the backward pass is given the inputs alone."""
    f, shapes = RECOMPUTED[name]
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    out, pullback = jax.vjp(f, *inputs)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= sum(x.nbytes for x in inputs)
    expected, plain_pullback = jax.vjp(f.__wrapped__, *inputs)
    d_out = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
    # The same float32 operations, which two programs may fuse and order differently.
    for a, b in zip((out, *pullback(d_out)), (expected, *plain_pullback(d_out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_mlp_keeps_its_hidden_width_once():
    """What `up` made; GELU of it, which the gradient of `down` needs, is computed again, to the plain formula's gradients."""
    mlp = dit.Mlp(hidden=40, dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
    params = nn.unbox(mlp.init(jax.random.key(0), x))
    _, pullback = jax.vjp(mlp.apply, params, x)
    assert [leaf.size for leaf in jax.tree.leaves(pullback)].count(2 * 5 * 40) == 1

    def plain(params, x):
        up, down = params["params"]["up"], params["params"]["down"]
        return nn.gelu(x @ up["kernel"] + up["bias"], approximate=True) @ down["kernel"] + down["bias"]

    gradients = [jax.grad(lambda *args, f=f: (f(*args) ** 2).sum(), argnums=(0, 1))(params, x) for f in (mlp.apply, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *gradients)
