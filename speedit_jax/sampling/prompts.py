"""Prompts: from flags, arguments or a file to what the network takes."""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax.encoders.text_encoder import TextEncoder, open_text_encoder
from speedit_jax.errors import UserError
from speedit_jax.models.condition import TextShape
from speedit_jax.sampling.conditions import Prompts
from speedit_jax.storage import first_line

_AT_ONCE = 64  # prompts that are encoded together


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; lines that begin with # are comments.

    Raises:
      UserError: it cannot be read, has an empty line, or no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"--prompts_file={path} cannot be read ({first_line(e)})") from e
    # Not splitlines, which also ends a line at signs of text from web pages.
    lines = text.removesuffix("\n").split("\n") if text else []
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if not line.startswith("#")]
    if empty := [number for number, line in numbered if not line]:
        raise UserError(f"--prompts_file={path}: line {empty[0]} is empty; remove it, or begin it with # as a comment")
    if not numbered:
        raise UserError(f"--prompts_file={path} holds no prompts")
    return [line for _, line in numbered]


def open_encoder(given: str | None, identity: dict[str, Any], shape: TextShape) -> TextEncoder:
    """The text encoder of a run.

    Args:
      given: where it is now; None is where it was.
      identity: of the run; imported weights do not know which encoder theirs was.
      shape: of the network's text.

    Raises:
      UserError: it is not there, or it is another one.
    """
    if "weights" in identity:
        return open_text_encoder(given, identity)
    if not given:
        raise UserError("imported weights do not say where their text encoder is: give --text_encoder")
    encoder = TextEncoder(given, shape.pooled)
    if encoder.width != shape.width:
        raise UserError(f"--text_encoder={given} has tokens of {encoder.width} numbers, but these weights want {shape.width}")
    return encoder


def encode_prompts(encoder: TextEncoder, texts: Sequence[str], negative: str, shape: TextShape) -> tuple[Prompts, list[str]]:
    """The prompts as the network takes them, and a warning for each that is longer than it takes.

    Args:
      encoder: of training.
      negative: what guidance leads away from; "" is the null condition of training.
      shape: of the network's text.
    """
    kept, warnings = [], []
    for text in texts:
        taken, lost = _cut(encoder, text, shape)
        kept.append(taken)
        if lost:
            warnings.append(f"a prompt is longer than the {shape.length} tokens that this run takes; lost: {lost!r}")
    negative, lost = _cut(encoder, negative, shape)
    if lost:
        warnings.append(f"the negative prompt is longer than the {shape.length} tokens that this run takes; lost: {lost!r}")
    encoded = [tokens for first in range(0, len(kept), _AT_ONCE) for tokens in _encode(encoder, kept[first : first + _AT_ONCE])]
    return Prompts(list(texts), encoded, _encode(encoder, [negative])[0], shape), warnings


def _encode(encoder: TextEncoder, texts: list[str]) -> list[np.ndarray]:
    """float16 [n, E] each, as a store of captions has them."""
    tokens, lengths = encoder.encode(texts)
    return [np.asarray(row[:length], np.float16) for row, length in zip(tokens, lengths, strict=True)]


def _cut(encoder: TextEncoder, text: str, shape: TextShape) -> tuple[str, str]:
    """(as many words of a text from the first on as the network takes, the others)."""

    def too_long(text: str) -> bool:
        return bool(encoder.cut(text)) or len(_encode(encoder, [text])[0]) > shape.length

    if not too_long(text):
        return text, ""
    words = text.split()
    count = bisect.bisect_left(range(1, len(words) + 1), True, key=lambda n: too_long(" ".join(words[:n])))
    return " ".join(words[:count]), " ".join(words[count:])
