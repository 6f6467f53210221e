"""What a network is conditioned on, as a tree of rows: labels int [B], or text {"tokens" [B, L, E], "length" int [B]}.

Rows of tokens from `length` on are padding, which no network looks at. The null condition, which guidance leads away from, is
such a tree without the axis of rows: the null label, or the text "" as its encoder has it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Condition = Any


@dataclasses.dataclass(frozen=True)
class TextShape:
    """The form of a text condition.

    Attributes:
      width: E, of the encoder.
      length: L, tokens of the longest caption, padding included.
      pooled: each caption is one vector.
    """

    width: int
    length: int
    pooled: bool = False

    @classmethod
    def of(cls, texts: Any) -> "TextShape":
        """Of captions, as data/texts.py has them."""
        return cls(texts.width, texts.length, texts.pooled)


def text_rows(shape: TextShape, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `count` rows of text."""
    return {
        "tokens": jax.ShapeDtypeStruct((count, shape.length, shape.width), jnp.float16),
        "length": jax.ShapeDtypeStruct((count,), jnp.int32),
    }


def padded(tokens: np.ndarray, length: Any, shape: TextShape) -> dict[str, np.ndarray]:
    """Text of fewer tokens, [..., n, E], as the network takes it: [..., L, E] float16."""
    short = shape.length - tokens.shape[-2]
    widths = [(0, 0)] * (tokens.ndim - 2) + [(0, short), (0, 0)]
    return {"tokens": np.pad(np.asarray(tokens, np.float16), widths), "length": np.asarray(length, np.int32)}


def replaced(rows: Condition, null: Condition, which: jax.Array) -> Condition:
    """`rows` with the null condition in those that `which`, bool [B], marks."""
    return jax.tree.map(lambda x, n: jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), n, x), rows, null)


def mean_token(text: dict[str, jax.Array]) -> jax.Array:
    """The mean of each text's tokens: [B, E] in float32 at least."""
    tokens = text["tokens"].astype(jnp.promote_types(text["tokens"].dtype, jnp.float32))
    return jnp.where(valid(text)[..., None], tokens, 0).sum(axis=1) / text["length"][:, None]


def valid(text: dict[str, jax.Array]) -> jax.Array:
    """Which tokens are no padding: bool [B, L]."""
    return jnp.arange(text["tokens"].shape[1]) < text["length"][:, None]
