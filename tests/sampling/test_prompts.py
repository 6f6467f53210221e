"""Prompts on their way to the network."""

import numpy as np
import pytest

from speedit_jax.encoders.text_encoder import TextEncoder
from speedit_jax.errors import UserError
from speedit_jax.models.condition import TextShape
from speedit_jax.sampling.conditions import Labels, stored_prompts
from speedit_jax.sampling.prompts import encode_prompts, read_prompts

WORDS = TextEncoder("words")
SHAPE = TextShape(WORDS.width, 8)


class Store:
    """Captions in memory, with the attributes of a store."""

    width, length, pooled, count = WORDS.width, 8, False, 10

    def captions(self, i):
        return [f"number {i}", "another"]

    def encoded(self, i):
        tokens, lengths = WORDS.encode(self.captions(i))
        return [np.asarray(row[:n], np.float16) for row, n in zip(tokens, lengths, strict=True)]

    @property
    def null(self):
        tokens, (length,) = WORDS.encode([""])
        return np.asarray(tokens[0, :length], np.float16), int(length)


def test_an_empty_negative_prompt_is_the_null_condition_of_training():
    asked, warnings = encode_prompts(WORDS, ["a cat"], "", SHAPE)
    stored = stored_prompts(Store(), 3)
    assert warnings == []
    for name, value in stored.null_text.items():
        np.testing.assert_array_equal(asked.null_text[name], value)
        assert asked.null_text[name].dtype == value.dtype
    negative, _ = encode_prompts(WORDS, ["a cat"], "a dog", SHAPE)
    assert not np.array_equal(negative.null_text["tokens"], asked.null_text["tokens"])


def test_prompts_are_taken_in_turn():
    prompts, _ = encode_prompts(WORDS, ["one", "two words"], "", SHAPE)
    rows = prompts.take(np.array([0, 1, 2, 5]))
    assert rows["tokens"].shape == (4, 8, WORDS.width) and rows["tokens"].dtype == np.float16
    assert rows["length"].tolist() == [2, 3, 2, 3]
    np.testing.assert_array_equal(rows["tokens"][0], rows["tokens"][2])
    tokens, _ = WORDS.encode(["two words"])
    np.testing.assert_array_equal(rows["tokens"][1, :3], tokens[0, :3].astype(np.float16))
    assert not rows["tokens"][1, 3:].any()
    assert Labels(np.array([3, 1])).take(np.array([0, 1, 2])).tolist() == [3, 1, 3]


def test_prompts_of_a_store_are_evenly_spaced():
    prompts = stored_prompts(Store(), 4)
    assert (prompts.texts, prompts.count) == (["number 0", "number 2", "number 5", "number 7"], 4)
    np.testing.assert_array_equal(prompts.encoded[2], Store().encoded(5)[0])
    assert stored_prompts(Store(), 100).count == 10


def test_what_is_too_long_is_cut_by_words():
    text = "one two three four five six seven eight nine"  # and an end token
    prompts, warnings = encode_prompts(WORDS, ["short", text], text, SHAPE)
    assert [len(tokens) for tokens in prompts.encoded] == [2, 8] and len(prompts.null) == 8
    assert warnings == [
        "a prompt is longer than the 8 tokens that this run takes; lost: 'eight nine'",
        "the negative prompt is longer than the 8 tokens that this run takes; lost: 'eight nine'",
    ]
    np.testing.assert_array_equal(prompts.encoded[1], encode_prompts(WORDS, [text[:-11]], "", SHAPE)[0].encoded[0])


def test_what_is_too_long_for_the_encoder_is_cut_too():
    pooled = TextEncoder("words", pooled=True)
    prompts, warnings = encode_prompts(pooled, ["word " * 300], "", TextShape(pooled.width, 1, True))
    assert [tokens.shape for tokens in prompts.encoded] == [(1, pooled.width)]
    # 255 words and an end token.
    assert warnings[0].count("word") == 300 - 255


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# of animals\n a cat \n\u732b\n#a dog\n")
    assert read_prompts(path) == ["a cat", "\u732b"]
    path.write_text("# one\r\na red\u2028cat\r\na dog", encoding="utf-8-sig", newline="")
    assert read_prompts(path) == ["a red\u2028cat", "a dog"], "only line breaks end a line"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a cat\n\na dog\n", "line 2 is empty"), (b"# a\n", "no prompts"), (b"", "no prompts"), (b"\xff", "cannot be read")],
)
def test_no_file_of_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
