"""From image files of any kind and size to arrays of one shape."""

import functools
import io
import math
import warnings
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError

from speedit_jax import storage
from speedit_jax.data.names import printable
from speedit_jax.data.pixels import MODES, WHITE, flatten
from speedit_jax.data.profiles import warn_once
from speedit_jax.errors import UserError

# Pillow warns of what it reads at half of the size from which on it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# EPS runs Ghostscript, MPEG is only recognised, and the numbers of FITS have no defined range.
_NOT_READ = {"EPS", "MPEG", "FITS"}
# ADM enlarges and then crops. From this many times the area of the crop on, the crop comes first.
_SLIVER = 4


@functools.cache
def suffixes() -> dict[str, str]:
    """{suffix in lower case: Pillow's name of the format} of the image files that the installed Pillow decodes by itself.

    Those are the suffixes of all formats that Pillow opens, without `_NOT_READ` and without stubs, which only hand on to
    another library.
    """
    Image.init()
    read = set()
    for name, (factory, _) in Image.OPEN.items():
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        if not stub and name not in _NOT_READ:
            read.add(name)
    read.add("MPO")  # photographs of phones: Pillow opens them as JPEG
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in read}


@functools.cache
def _formats() -> tuple[str, ...]:
    return tuple(sorted(set(suffixes().values()) & Image.OPEN.keys()))


def open_image(file: Path | BinaryIO) -> ImageFile.ImageFile:
    """Pillow's Image.open of the formats of `suffixes`, whatever the file is called.

    Raises:
      ValueError: it is none of them.
      Exception: its header is damaged.
    """
    if isinstance(file, PurePath) and storage.is_remote(file):
        file = io.BytesIO(file.read_bytes())
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as e:
        raise ValueError("it is not an image in a format that Pillow reads") from e


def parse_background(name: str) -> tuple[int, int, int]:
    """A colour's name or #rrggbb -> (red, green, blue), 0..255.

    Raises:
      UserError: it is not a colour, or one with transparency.
    """
    try:
        colour = ImageColor.getrgb(name)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise UserError(f"data.background={name}: not a colour; give a name such as white, or #rrggbb")
    return colour


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM's rule: halve with a box filter while at least twice too big, then bicubic, then crop the centre.

    Where the enlarged image would be far larger than the crop, only the part that the crop shows is enlarged: the same picture
    to rounding.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    if size[0] * size[1] > _SLIVER * width * height:
        return _resize_part(image, size, (left, top), (width, height))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def _resize_part(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], shape: tuple[int, int]) -> Image.Image:
    """The part of `shape` at `corner` of the image resized to `size`; all are (across, down)."""
    window, box = [], []
    for full, resized, first, length in zip(image.size, size, corner, shape, strict=True):
        step = full / resized
        low, high = first * step, (first + length) * step
        reach = math.ceil(3 * max(1, step))  # the bicubic filter looks 2 pixels far
        start, end = max(0, math.floor(low) - reach), min(full, math.ceil(high) + reach)
        window.append((start, end))
        box.append((low - start, high - start))
    # Pillow keeps the box in single precision, which is enough near 0.
    (x0, x1), (y0, y1) = window
    (left, right), (top, bottom) = box
    return image.crop((x0, y0, x1, y1)).resize(shape, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def check_channels(channels: int) -> None:
    """Raises a UserError unless images can be read with so many channels."""
    if channels not in MODES:
        raise UserError(f"data.channels={channels}: image files give 1 (grey) or 3 (RGB) channels")


def read_image(file: Path | BinaryIO, image_shape: tuple[int, int, int], background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """The first frame of an image file, upright, scaled and cropped: [H, W, C] float32 in [-1, 1].

    Args:
      file: where it is, or its content.
      image_shape: (H, W, C), C being 1 or 3.
      background: the colour behind transparent parts, 0..255 in sRGB.

    Raises:
      Exception: it cannot be decoded, its numbers have no defined range, or it is larger than 179 million pixels; Pillow raises
        many kinds for many kinds of damage.
    """
    height, width, channels = image_shape
    pixels = np.asarray(centre_crop(_flat(file, channels, background), height, width), np.float32)
    return (pixels / 127.5 - 1.0).reshape(image_shape)


def read_whole(file: Path | BinaryIO, channels: int, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """The same, of its own size and neither scaled nor cropped: uint8 [H, W, C]."""
    pixels = np.asarray(_flat(file, channels, background))
    return pixels.reshape(*pixels.shape[:2], channels)


def _flat(file: Path | BinaryIO, channels: int, background: tuple[int, int, int]) -> Image.Image:
    with open_image(file) as image:
        flat, fault = flatten(image, channels, background)
        if fault:
            warn_once(printable(image.filename) or "an image", fault)
    return flat
