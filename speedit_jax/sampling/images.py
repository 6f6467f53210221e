"""Samples as pictures: 8-bit images, grids of them, PNG files."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from speedit_jax.storage import make_directory, replacing


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, rounded."""
    return np.round((np.asarray(images, np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 [n, H, W, C] -> one picture, by default about square, its cells a pixel or a thirty-second apart."""
    n, h, w, c = images.shape
    gap = max(1, w // 32)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, h + gap, w + gap, c), 127, np.uint8)
    cells[:n, :h, :w] = images
    picture = cells.reshape(rows, columns, h + gap, w + gap, c).transpose(0, 2, 1, 3, 4)
    return picture.reshape(rows * (h + gap), columns * (w + gap), c)[:-gap, :-gap]


def write_png(path: Path, picture: np.ndarray, magnify: int = 1) -> None:
    """Writes uint8 [H, W, 1 or 3 or more], each pixel enlarged to a square of `magnify`.

    Of more than three channels (latents) the first three are shown.
    """
    picture = picture.repeat(magnify, 0).repeat(magnify, 1)
    picture = picture[..., 0] if picture.shape[-1] < 3 else picture[..., :3]
    make_directory(path.parent)
    with replacing(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def magnification(height: int) -> int:
    """How much to enlarge small images so that a person can see them."""
    return max(1, 48 // height)
