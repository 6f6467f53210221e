"""BERT against transformers' at random weights (fixture, float64), and what padding must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import recorded, weights, write_bert

from speedit_jax.interop.bert import read_config, tensor_name
from speedit_jax.models.text import load_bert

RECORDED = recorded("bert")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = write_bert(tmp_path_factory.mktemp("bert"))
    return load_bert(directory, read_config(directory))


def valid(hidden):
    return np.concatenate([row[:length] for row, length in zip(np.asarray(hidden), RECORDED["lengths"], strict=True)])


def test_float32_is_transformers(bert):
    network, params = bert
    hidden = network.apply(params, RECORDED["numbers"], RECORDED["lengths"])
    np.testing.assert_allclose(valid(hidden), valid(RECORDED["hidden"]), atol=1e-5)


def test_float64_is_transformers(bert):
    network, params = bert
    left = weights("bert")

    def exact(path, _):
        keys = tuple(key.key for key in path)
        value = left.pop(tensor_name(keys))
        return jnp.asarray(value.T if keys[-1] == "kernel" else value)

    with jax.enable_x64(True):
        hidden = network.apply(jax.tree_util.tree_map_with_path(exact, params), RECORDED["numbers"], RECORDED["lengths"])
    assert hidden.dtype == np.float64 and not left
    np.testing.assert_allclose(valid(hidden), valid(RECORDED["hidden"]), atol=1e-12)


def test_padding_changes_nothing(bert):
    network, params = bert
    numbers, lengths = RECORDED["numbers"], RECORDED["lengths"]
    short = network.apply(params, numbers, lengths)
    longer = network.apply(params, np.pad(numbers, ((0, 0), (0, 7)), constant_values=5), lengths)
    np.testing.assert_allclose(valid(longer), valid(short), atol=1e-6)
