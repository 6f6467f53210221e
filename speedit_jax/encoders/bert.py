"""A BERT as a text encoder: WordPiece, the network, and its pooling."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speedit_jax.data.texts import rounded
from speedit_jax.interop import bert as files
from speedit_jax.interop.transformers_files import weights_file
from speedit_jax.models.text import load_bert
from speedit_jax.storage import sha256


class BertNetwork:
    """What encoders/text_encoder.py needs of a BERT in `directory`.

    Raises:
      UserError: it cannot be read.
    """

    def __init__(self, directory: Path):
        config = files.read_config(directory)
        self._tokenizer = files.WordPiece(directory, config["lower_case"], config["accents"], config["chinese"])
        bert, self._params = load_bert(directory, config)
        self._apply = jax.jit(bert.apply)
        self._pooling, self.width = config["pooling"], bert.config.hidden_size
        kept = {key: config[key] for key in ("model_type", "lower_case", "accents", "chinese", "pooling")}
        self.facts: dict[str, Any] = {
            "weights": sha256(weights_file(directory)),
            "vocabulary": sha256(directory / files.VOCABULARY),
            "config": kept | dataclasses.asdict(bert.config),
            "length": config["longest"],
        }

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        longest, tokenizer = self.facts["length"], self._tokenizer
        numbers = [[tokenizer.start, *tokenizer.numbers(text)[: longest - 2], tokenizer.end] for text in texts]
        lengths = np.array([len(row) for row in numbers], np.int32)
        # Few shapes, since each is compiled: a power of two of texts, of a multiple of 8 tokens.
        count, length = 1 << (len(texts) - 1).bit_length(), min(rounded(lengths.max()), longest)
        filled = np.full((count, length), tokenizer.padding, np.int32)
        for row, found in zip(filled, numbers, strict=False):
            row[: len(found)] = found
        valid = np.concatenate([lengths, np.ones(count - len(texts), np.int32)])
        hidden = np.asarray(self._apply(self._params, filled, valid))
        return [row[:length] for row, length in zip(hidden, lengths, strict=False)]

    def pool(self, rows: np.ndarray) -> np.ndarray:
        """Of norm 1, as sentence-transformers does."""
        vector = rows[0] if self._pooling == "first" else rows.mean(axis=0)
        return vector / np.linalg.norm(vector)

    def cut(self, text: str) -> str:
        words, left = text.split(), self.facts["length"] - 2
        for i, word in enumerate(words):
            left -= len(self._tokenizer.numbers(word))
            if left < 0:
                return " ".join(words[i:])
        return ""
