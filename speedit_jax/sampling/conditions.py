"""What each image is drawn of: its class or its prompt. Image i has the i-th, and further images begin again with the first."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from speedit_jax.models.condition import TextShape, padded


class Conditions(Protocol):
    """The conditions of any number of images.

    Attributes:
      count: how many different ones there are.
      null_text: what guidance leads away from, of text; None of classes.
    """

    count: int
    null_text: Any

    def take(self, indices: np.ndarray) -> Any:
        """The rows of the images `indices`, as Model.conditions has them."""
        ...


@dataclasses.dataclass(frozen=True)
class Labels:
    """Classes by number: int32 [N]."""

    labels: np.ndarray
    null_text = None

    @property
    def count(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.labels[indices % self.count], np.int32)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Encoded texts.

    Attributes:
      texts: for people.
      encoded: the tokens of each, [n, E].
      null: of the empty text or of a negative prompt.
      shape: to which each is padded.
    """

    texts: Sequence[str]
    encoded: Sequence[np.ndarray]
    null: np.ndarray
    shape: TextShape

    @property
    def count(self) -> int:
        return len(self.encoded)

    @property
    def null_text(self) -> dict[str, np.ndarray]:
        return padded(self.null, len(self.null), self.shape)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        texts = [self.encoded[i] for i in indices % self.count]
        rows = [padded(tokens, len(tokens), self.shape) for tokens in texts]
        return {name: np.stack([row[name] for row in rows]) for name in ("tokens", "length")}


@dataclasses.dataclass(frozen=True)
class _FirstCaptions:
    """Their tokens, read when they are asked for."""

    texts: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        return self.texts.encoded(self.record(i))[0]

    def record(self, i: int) -> int:
        return int(i * self.texts.count // self.count)


def stored_prompts(texts: Any, count: int) -> Prompts:
    """The first captions of `count` records of a store, evenly spaced, or of all where there are fewer."""
    captions = _FirstCaptions(texts, min(count, texts.count))
    names = [texts.captions(captions.record(i))[0] for i in range(captions.count)]
    return Prompts(names, captions, texts.null[0], TextShape.of(texts))
