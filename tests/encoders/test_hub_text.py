"""Models of transformers as text encoders, small ones of random weights: their last hidden states, as they compute them."""

import sys

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.encoders.text_encoder import TextEncoder

WORDS = ["<pad>", "<unk>", "</s>", "a", "red", "blob", "at", "the", "top", "left"]
TEXTS = ["a red blob at the top left", "", "red"]


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_line(lambda: TextEncoder("hf:google/t5-v1_1-small"), "pip install", "[text]")


@pytest.fixture(scope="module", params=["T5", "CLIP", "Gemma2", "Bert"])
def model(request, tmp_path_factory):
    """(transformers' model, the directory that it is saved in)."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    size = {"vocab_size": len(WORDS), "pad_token_id": 0}
    if request.param == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
        model = transformers.T5EncoderModel(transformers.T5Config(**size, **sizes))
    elif request.param == "CLIP":
        limits = {"max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 3}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size, **small, **limits))
    elif request.param == "Gemma2":
        heads = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 12}
        model = transformers.Gemma2Model(transformers.Gemma2Config(**size, **small, **heads))
    else:
        model = transformers.BertModel(transformers.BertConfig(**size, **small, max_position_embeddings=12))
    model.eval().save_pretrained(directory)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 12}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    return model, directory


def test_last_hidden_states(model):
    network, directory = model
    encoder = TextEncoder(f"hf:{directory}")
    tokens, lengths = encoder.encode(TEXTS)
    assert tokens.shape == (3, 8, 16) and lengths.tolist() == [8, 1, 2] and encoder.width == 16
    import torch

    for row, text in zip(tokens, TEXTS, strict=True):
        numbers = torch.tensor([[WORDS.index(word) for word in [*text.split(), "</s>"]]])
        with torch.no_grad():
            expected = network(input_ids=numbers).last_hidden_state[0].numpy()
        # Padded and alone: float32 sums in another order.
        np.testing.assert_allclose(row[: len(expected)], expected, atol=2e-5)
        assert not row[len(expected) :].any()


def test_pooled(model):
    network, directory = model
    vector = TextEncoder(f"hf:{directory}", pooled=True).encode(TEXTS)[0][0, 0]
    rows = TextEncoder(f"hf:{directory}").encode(TEXTS)[0][0]
    expected = rows[-1] if "CLIP" in type(network).__name__ else rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_limits_and_identity(model):
    _, directory = model
    encoder = TextEncoder(f"hf:{directory}")
    assert encoder.identity["length"] == 12
    text = "a red blob at the top left a red blob at the top"
    assert encoder.encode([text])[1].tolist() == [12]
    assert encoder.cut(text) == "the top" and encoder.cut(TEXTS[0]) == ""
    encoder.check(TextEncoder(f"hf:{directory}/").identity)


def test_a_model_that_is_not_there(tmp_path):
    pytest.importorskip("transformers")
    assert_one_line(lambda: TextEncoder(f"hf:{tmp_path}/none"), "cannot be loaded by transformers")
