"""What an image file holds, as 8-bit sRGB or grey without transparency."""

import numpy as np
from PIL import Image, ImageFile, ImageOps

from speedit_jax.data.profiles import ProfileError, to_srgb

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
WHITE = (255, 255, 255)
_GREY = ("1", "L", "LA", "La")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
# Numbers of 16 bits that stay below this are those of a sensor with 14 bits or fewer, or no brightness at all.
_TOO_DARK = 2**14
_SAVE_AGAIN = "save it with 8 bits a channel, or scaled to all 16"


def flatten(image: ImageFile.ImageFile, channels: int, background: tuple[int, int, int]) -> tuple[Image.Image, str | None]:
    """An opened file -> (its first frame, upright, mode L (1 channel) or RGB (3); why its colour profile is ignored, if it is).

    Numbers of 16 bits, and of TIFF's 12, are scaled to 8. Colours are converted by the file's profile. Transparent parts show
    the background, as much as they are transparent.

    Raises:
      ValueError: its numbers have no defined range.
      Exception: it cannot be decoded; Pillow raises many kinds.
    """
    upright = _eight_bits(image)
    grey, alpha, fault = upright.mode in _GREY, None, None
    if upright.has_transparency_data:
        rgba = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        if rgba.getextrema()[3][0] < 255:
            alpha = rgba.getchannel("A")
            upright = rgba.convert("RGB")
    try:
        upright = to_srgb(upright, grey)
    except ProfileError as e:
        fault = str(e)
    if alpha:
        upright = Image.composite(upright.convert("RGB"), Image.new("RGB", upright.size, background), alpha)
    return upright.convert(MODES[channels]), fault


def _eight_bits(image: ImageFile.ImageFile) -> Image.Image:
    """Upright, with 8 bits a channel or fewer; what is transparent stays so."""
    white, negative, deep = _white(image), False, _is_deep(image)
    if image.format == "TIFF" and image.mode.startswith("I"):
        negative = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # which Pillow heeds in 8 bits only
    spread = _spread(image)
    upright = ImageOps.exif_transpose(image)
    if not upright.mode.startswith("I"):
        if deep:
            # Pillow keeps the upper 8 of 16 bits.
            _check_used(max(high for _, high in upright.convert("RGB").getextrema()) * 256)
            if isinstance(clear := upright.info.get("transparency"), tuple):
                upright.info["transparency"] = tuple(level >> 8 for level in clear)
        elif isinstance(clear := upright.info.get("transparency"), int):
            upright.info["transparency"] = clear * spread
        return upright
    numbers = np.asarray(upright).astype(np.uint32)
    if white == 65535:
        _check_used(numbers.max())
    eight = Image.fromarray(((white - numbers if negative else numbers) * 255 // white).astype(np.uint8))
    if (clear := upright.info.pop("transparency", None)) is not None:
        eight = Image.merge("LA", (eight, Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8))))
    eight.info = upright.info
    return eight


def _white(image: ImageFile.ImageFile) -> int:
    """The largest number that a channel of a file can hold, as Pillow gives it.

    Raises:
      ValueError: the file does not say.
    """
    if image.mode == "F":
        raise ValueError(f"its numbers are floats, which have no defined range; {_SAVE_AGAIN}")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"its numbers are signed or of 32 bits, which have no defined range; {_SAVE_AGAIN}")
    if not image.mode.startswith("I"):
        return 255
    return 4095 if image.format == "TIFF" and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,) else 65535


def _spread(image: ImageFile.ImageFile) -> int:
    """By how much Pillow multiplies the greys of 2 or 4 bits of a PNG, but not the one that is clear."""
    decoders = str([tile[3] for tile in image.tile]) if image.format == "PNG" else ""
    return 85 if "L;2" in decoders else 17 if "L;4" in decoders else 1


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow is going to bring colours of 16 bits down to 8."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    decoders = str([(tile[0], tile[3]) for tile in image.tile])
    return any(sign in decoders for sign in (";16", "SGI16", "65535"))  # the last one is PPM's white


def _check_used(largest: int) -> None:
    if 0 < largest < _TOO_DARK:
        raise ValueError(
            f"its 16-bit numbers stay below {_TOO_DARK} of 65535: either fewer bits stored in 16, or no brightness at all;"
            f" {_SAVE_AGAIN}"
        )
