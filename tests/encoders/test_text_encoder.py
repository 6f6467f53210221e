"""Text encoders: what is theirs is theirs wherever it lies, and rows do not depend on their neighbours."""

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.encoders.text_encoder import TextEncoder, open_text_encoder


@pytest.fixture(scope="module")
def words():
    return TextEncoder("words")


def test_words(words):
    tokens, lengths = words.encode(["A red  blob", "", "blob, red: a!", "a red blob at the top of nine words"])
    assert (tokens.shape, tokens.dtype, lengths.dtype) == ((4, 16, 64), np.float32, np.int32)
    assert lengths.tolist() == [4, 1, 4, 10]
    np.testing.assert_array_equal(tokens[0, :3], tokens[2, [2, 1, 0]])  # a word is a vector, whatever is around it
    np.testing.assert_array_equal(tokens[0, 3], tokens[1, 0])  # the end
    for row, length in zip(tokens, lengths, strict=True):
        assert not row[length:].any()
    # 64 normals: a word's deviation has a standard deviation of 1/11, and two words' cosines one of 1/8.
    np.testing.assert_allclose(tokens[3, :10].std(axis=1), 1, atol=0.35)
    assert np.abs(np.corrcoef(tokens[3, :10]) - np.eye(10)).max() < 0.6


def test_words_are_the_same_everywhere(words):
    """Recorded: a run's prompts must meet the vectors of its training, in later versions, too."""
    tokens, _ = words.encode(["blob"])
    np.testing.assert_allclose(tokens[0, 0, :3], [0.322237, -1.058263, 0.071172], atol=1e-6)


def test_pooled(words):
    pooled = TextEncoder("words", pooled=True)
    tokens, lengths = pooled.encode(["a red blob", ""])
    assert tokens.shape == (2, 1, 64) and lengths.tolist() == [1, 1]
    rows = words.encode(["a red blob"])[0][0, :4].mean(axis=0)
    np.testing.assert_allclose(tokens[0, 0], rows / np.linalg.norm(rows), rtol=1e-6)


def test_what_is_too_long_is_said(words):
    text = " ".join(f"word{i}" for i in range(260))
    assert words.cut("a red blob") == "" and words.cut(text) == "word255 word256 word257 word258 word259"
    _, lengths = words.encode([text])
    assert lengths.tolist() == [256] == [words.identity["length"]]


def test_identity(words):
    open_text_encoder(None, words.identity).check(words.identity | {"encoder": "/elsewhere"})
    assert_one_line(lambda: words.check(words.identity | {"weights": "others", "encoder": "minilm"}), "minilm", "another weights")
    assert_one_line(lambda: words.check(words.identity | {"pooled": True}), "another pooled")
    assert_one_line(lambda: TextEncoder("no such"), "unknown text encoder 'no such'")
