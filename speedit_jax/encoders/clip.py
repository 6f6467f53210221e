"""A CLIP around the CLIP score: images and texts to vectors whose cosine says how well they go together."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from speedit_jax import sharding, storage
from speedit_jax.data.texts import rounded
from speedit_jax.encoders.hub_text import load_tokenizer
from speedit_jax.errors import UserError
from speedit_jax.interop.clip import read_processor
from speedit_jax.interop.directories import CONFIG
from speedit_jax.interop.transformers_files import weights_file
from speedit_jax.models.clip import load_clip

_TEXTS = 64  # at a time
# Of the published models' training images, 0 to 1; preprocessor_config.json may have others.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """uint8 [B, H, W, 1 or 3] to {"clip": [B, E]}, and texts to [n, E], all of norm 1.

    Args:
      where: a directory as transformers stores a CLIP.
      mesh: its batch axes divide B; every process has all of the vectors.

    Attributes:
      outputs: {"clip": E}.
      identity: JSON that says which weights these are.
      length: the most tokens of a text.

    Raises:
      UserError: it cannot be read.
    """

    name = "clip"

    def __init__(self, where: str, mesh: Mesh):
        given = storage.path(where)
        if not (given / CONFIG).is_file():
            raise UserError(
                f"{where} holds no {CONFIG}; give a directory with {CONFIG}, model.safetensors and tokenizer.json of a CLIP, as"
                " transformers stores it"
            )
        directory = storage.fetched(given)
        clip, params = load_clip(directory)
        self._tokenize = load_tokenizer(directory)
        self.length, self.outputs = clip.config.text.max_position_embeddings, {"clip": clip.config.projection_dim}
        self.identity: dict[str, Any] = {"clip": where, "sha256": storage.sha256(weights_file(directory))}
        self._side = clip.config.image.image_size
        processor = {"image_mean": _MEAN, "image_std": _STD, "size": self._side, "crop_size": self._side}
        processor |= read_processor(directory)
        self._short = processor["size"]
        if processor["crop_size"] != self._side or self._short < self._side:
            raise UserError(
                f"{directory}: its preprocessor scales to {self._short} and crops to {processor['crop_size']} pixels, but the"
                f" network sees {self._side}"
            )
        self._mean, self._std = (np.asarray(processor[key], np.float32) for key in ("image_mean", "image_std"))
        self._rows = sharding.batch_sharding(mesh)
        everywhere = sharding.replicated(mesh)
        self._params = jax.device_put(params, everywhere)
        self._image = jax.jit(clip.image, in_shardings=(None, self._rows), out_shardings=everywhere)
        self._text = jax.jit(clip.text, in_shardings=(None, everywhere), out_shardings=everywhere)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        prepared = np.stack([self.prepare(image) for image in images])
        return {"clip": _unit(self._image(self._params["image"], sharding.from_host(self._rows, prepared)))}

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 1 or 3] -> float32 [S, S, 3]: the short side scaled (bicubic), the centre cropped, normalised."""
        picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        short = min(picture.size)
        width, height = (self._short if side == short else int(self._short * side / short) for side in picture.size)
        left, top = (width - self._side) // 2, (height - self._side) // 2
        scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        return (scaled[top : top + self._side, left : left + self._side] / 255 - self._mean) / self._std

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [n, E] of texts; each is cut at `length` tokens."""
        different = list(dict.fromkeys(texts))
        numbers = [self._cut(tokens) for tokens in self._tokenize(different)]
        filled = np.zeros((len(numbers) + -len(numbers) % _TEXTS, min(rounded(max(map(len, numbers))), self.length)), np.int32)
        for row, tokens in zip(filled, numbers, strict=False):
            row[: len(tokens)] = tokens
        # The network is causal, and looks at the end of each text: what is filled in after that changes nothing.
        parts = [_unit(self._text(self._params["text"], part)) for part in np.split(filled, len(filled) // _TEXTS)]
        vectors = dict(zip(different, np.concatenate(parts), strict=False))
        return np.stack([vectors[text] for text in texts])

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Those that are cut."""
        different = list(dict.fromkeys(texts))
        return [text for text, tokens in zip(different, self._tokenize(different), strict=True) if len(tokens) > self.length]

    def _cut(self, tokens: list[int]) -> list[int]:
        return tokens if len(tokens) <= self.length else [*tokens[: self.length - 1], tokens[-1]]


def _unit(vectors: jax.Array) -> np.ndarray:
    found = jax.device_get(vectors)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)
