"""ICC colour profiles: from the colours that a file means to sRGB, which is what screens and encoders expect."""

import functools
import io
import sys
import threading

import numpy as np
from PIL import Image, ImageCms
from tqdm import tqdm

# A profile that moves no colour by more is sRGB itself: its images keep their bits. Display P3 moves some by 60 and more.
_SRGB_WITHIN = 3  # of 255
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's colour space -> Pillow's mode
_warned = threading.Event()


class ProfileError(Exception):
    """A colour profile that cannot be used."""


def to_srgb(image: Image.Image, grey: bool) -> Image.Image:
    """Converts by the image's own profile, perceptually; images without one, or in sRGB, are returned as they are.

    Args:
      image: 8 bits a channel, of any mode.
      grey: whether the file is grey; its profile may be one of greys or of RGB.

    Raises:
      ProfileError: the profile is damaged, or one of another kind of image.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":  # Pillow converts LAB by itself
        return image
    mode = "L" if grey else image.mode if image.mode == "CMYK" else "RGB"
    transform = _transform(profile, mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(transform.input_mode), transform)
    return converted.convert("L") if grey else converted


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile is sRGB."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if (space, mode) == ("RGB", "L"):
            mode = "RGB"
        if _MODES.get(space) != mode:
            raise ProfileError(f"a profile of {space} in an image of {mode}")
        srgb = ImageCms.createProfile("sRGB")
        # Little CMS' shortcut for greys is some levels off near black.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)
    except (ImageCms.PyCMSError, OSError) as e:
        raise ProfileError(" ".join(str(e).split())) from e
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    colours = levels[:, None] if mode == "L" else np.stack(np.meshgrid(*[levels] * 3), axis=-1).reshape(-1, 1, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform), int)
    moved = np.abs(converted - colours.reshape(len(colours), 1, -1)).max()
    return None if moved <= _SRGB_WITHIN else transform


def warn_once(name: str, fault: str) -> None:
    """Says of the first file of this process that its profile is ignored."""
    if not _warned.is_set():
        _warned.set()
        tqdm.write(
            f"warning: {name}: its colour profile cannot be used ({fault}) and is ignored, as will be others of the kind;"
            " python -m speedit_jax.check_data lists them",
            file=sys.stderr,
        )
