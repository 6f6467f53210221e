"""Inception-v3 against torch-fidelity's numbers, recorded by fixtures/make_evaluation.py from weights that both sides make.

Ours are float32, theirs float64; the tolerance is 1e-4 of the largest number. The whole network compiles for long, so the default
tests run its blocks, one of each kind, and its resize.
"""

import functools
from pathlib import Path

import inception_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.interop.inception import arrange, tensor_name, torch_shape
from speedit_jax.models.inception import BLOCKS, OUTPUTS, InceptionV3, Mixed, load_inception, resize

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.npz"


@functools.cache
def recorded():
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def tensors():
    """torch-fidelity's state_dict, with all that only training wants."""
    shapes = [tuple(int(n) for n in shape if n) for shape in recorded()["shapes"]]
    return {name: inception_weights.weight(name, shape) for name, shape in zip(recorded()["names"], shapes, strict=True)}


@functools.cache
def network_shapes():
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", inception_weights.BLOCKS)
def test_blocks(name):
    def weights(path, leaf):
        full = tensor_name((name, *(key.key for key in path)))
        value = inception_weights.weight(full, torch_shape(leaf.shape))
        return value.transpose(2, 3, 1, 0) if leaf.ndim == 4 else value

    params = jax.tree_util.tree_map_with_path(weights, network_shapes()[name])
    x = nhwc(inception_weights.block_input(name))
    ours = jax.jit(Mixed(**BLOCKS[name]).apply)({"params": params}, x)
    theirs = nhwc(recorded()[f"block/{name}"])
    assert theirs.std() > 0.05 * np.abs(theirs).max()
    assert_close(ours[..., :: inception_weights.STORED], theirs)


@pytest.mark.parametrize("name", inception_weights.IMAGES)
def test_resize(name):
    ours = resize(jnp.asarray(nhwc(inception_weights.images(name)), jnp.float32))
    assert ours.shape[1:] == (299, 299, 3)
    np.testing.assert_allclose(ours[:1, ::7, ::11, :1], nhwc(recorded()[f"{name}/resized"]), rtol=0, atol=1e-3)


def test_resize_is_not_the_one_of_later_libraries():
    x = jnp.asarray(nhwc(inception_weights.images("wide")), jnp.float32)
    later = jax.image.resize(x, (*x.shape[:1], 299, 299, 3), "bilinear", antialias=False)
    assert np.abs(resize(x) - later).max() > 10
    np.testing.assert_array_equal(resize(x, 40)[:, :, 0], x[:, :, 0])  # as many rows as there are


def test_every_tensor_of_the_port_has_its_place():
    params = arrange(tensors(), network_shapes(), "x")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_884_384
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors()["fc.weight"].T)


def test_outputs():
    out = jax.eval_shape(InceptionV3().apply, {"params": network_shapes()}, jax.ShapeDtypeStruct((5, 64, 32, 3), jnp.uint8))
    assert {name: leaf.shape for name, leaf in out.items()} == {name: (5, n) for name, n in OUTPUTS.items()}
    assert OUTPUTS == {"pool": 2048, "spatial": 2023, "logits": 1008}


@pytest.mark.slow
def test_the_whole_network(tmp_path):
    np.savez(tmp_path / "weights.npz", **tensors())
    features, params = load_inception(str(tmp_path / "weights.npz"))
    run = jax.jit(features)
    for name in inception_weights.IMAGES:
        ours = run(params, nhwc(inception_weights.images(name)))
        for output in OUTPUTS:
            theirs = recorded()[f"{name}/{output}"]
            if len(theirs) > 1:  # the images matter a hundred times more than the tolerance
                assert np.abs(theirs[0] - theirs[1]).max() > 1e-2 * np.abs(theirs).max()
            assert_close(ours[output], theirs)
    # Grey images are three equal channels.
    grey = nhwc(inception_weights.images("large"))[..., :1]
    expected = run(params, grey.repeat(3, -1))
    for output, values in run(params, grey).items():
        assert_close(values, np.asarray(expected[output]), 1e-5)
