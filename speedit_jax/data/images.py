"""From image files of any kind and size to arrays of one shape."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from speedit_jax.errors import UserError

# Pillow warns of what it reads at half of the size from which on it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_MODES = {1: "L", 3: "RGB"}


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM's rule: halve with a box filter while at least twice too big, then bicubic, then crop the centre."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_channels(channels: int) -> None:
    """Raises a UserError unless images can be read with so many channels."""
    if channels not in _MODES:
        raise UserError(f"data.channels={channels}: image files give 1 (grey) or 3 (RGB) channels")


def read_image(file: Path | BinaryIO, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The first frame of an image file, upright, scaled and cropped: [H, W, C] float32 in [-1, 1].

    Raises:
      Exception: it cannot be decoded, or is larger than 179 million pixels; Pillow raises many kinds for many kinds of damage.
    """
    height, width, channels = image_shape
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            # 16 bits a channel, which convert() would clip to white.
            upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
        pixels = np.asarray(centre_crop(upright.convert(_MODES[channels]), height, width), np.float32)
    return (pixels / 127.5 - 1.0).reshape(image_shape)
