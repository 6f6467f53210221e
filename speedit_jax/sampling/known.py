"""Pictures that samples start from or are to complete: --image and --mask."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.data.images import parse_background, read_whole, suffixes
from speedit_jax.data.names import printable
from speedit_jax.diffusion.inverse import Plan, latent_mask
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError

_RESAMPLE = {"repaint": 10}  # RePaint's own; others do not go back


@dataclasses.dataclass(frozen=True)
class Pictures:
    """n pictures; sample i takes picture i mod n.

    Attributes:
      pictures: uint8 [n, H, W, C].
      keep: bool [n, H, W, 1], True where the pixels are to stay; None without a mask.
      images: what the model sees of them, float32 [n, h, w, C]: the pixels in [-1, 1], or their latents.
      known: which of that is known, bool [n, h, w, 1]; None without a mask.
      plan: how they are used.
    """

    pictures: np.ndarray
    keep: np.ndarray | None
    images: np.ndarray
    known: np.ndarray | None
    plan: Plan

    def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(images, known) of these samples."""
        which = np.asarray(indices) % len(self.images)
        return self.images[which], None if self.known is None else self.known[which]

    def composite(self, first: int, samples: np.ndarray) -> np.ndarray:
        """Samples uint8 [B, H, W, C], number `first` and on, with the pictures' own pixels where they are to stay."""
        if self.keep is None:
            return samples
        which = np.arange(first, first + len(samples)) % len(self.pictures)
        return np.where(self.keep[which], self.pictures[which], samples)

    def told(self) -> np.ndarray:
        """The pictures with mid grey where they are to be filled, uint8 [n, H, W, C]."""
        return np.where(self.keep, self.pictures, 127).astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        """All that samples depend on, JSON."""
        return {
            "pictures": len(self.pictures),
            "image_sha256": hashlib.sha256(self.pictures.tobytes()).hexdigest(),
            "mask_sha256": None if self.keep is None else hashlib.sha256(self.keep.tobytes()).hexdigest(),
            **dataclasses.asdict(self.plan),
        }


def choose_plan(
    masked: bool,
    hinted: bool,
    strength: float | None = None,
    inpaint: str | None = None,
    resample: int | None = None,
    jump: int | None = None,
) -> Plan:
    """The plan of these choices, of which None is the default.

    Args:
      masked: there is a mask.
      hinted: the network takes what is known.

    Raises:
      UserError: they do not go together.
    """
    if not masked:
        for name, value in (("inpaint", inpaint), ("resample", resample), ("jump", jump)):
            if value is not None:
                raise UserError(f"{name}={value} is for inpainting and needs a mask")
        if strength is None or strength == 1:
            raise UserError("an image without a mask changes nothing at strength 1; give a mask, or a strength such as 0.6")
    if inpaint == "network" and not hinted:
        raise UserError("inpaint=network needs a run that was trained with data.mask; projection works with every run")
    method = inpaint or ("network" if hinted else "projection")
    resample = _RESAMPLE.get(method, 1) if resample is None else resample
    if jump is not None and resample == 1:
        raise UserError(f"jump={jump} has no effect with resample=1: say how often these steps are run, such as resample=5")
    return Plan(method, 1.0 if strength is None else strength, resample, Plan.jump if jump is None else jump)


def check_sampler(plan: Plan, sampler: str, flow: bool) -> None:
    """Raises a UserError for a sampler, not "auto", that the plan is not made for."""
    if plan.method == "repaint" and (flow or sampler == "dpm++"):
        raise UserError(f"inpaint=repaint needs the sampler ddpm or ddim, not {sampler}; projection works with every sampler")


def read_pictures(
    image: str, mask: str | None, shape: tuple[int, int, int], background: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads --image and --mask: each a file, or a directory of files of the same names but for the suffix.

    Args:
      shape: (H, W, C) that they must have.
      background: behind transparent parts of images, as data.background. Transparent parts of a mask are white.

    Returns:
      (uint8 [n, H, W, C], bool [n, H, W, 1] or None: where the mask is black).

    Raises:
      UserError: a file cannot be read, is not of this size, or is no mask.
    """
    where = storage.path(image)
    files = _files(where, "--image")
    pictures = np.stack([_read(path, shape, background) for path in files])
    if mask is None:
        return pictures, None
    masks = _files(storage.path(mask), "--mask")
    if where.is_dir() and storage.path(mask).is_dir():
        named = {path.stem: path for path in masks}
        missing = [path.name for path in files if path.stem not in named]
        if missing:
            raise UserError(f"--mask={mask} has no mask for {printable(missing[0])}; it needs a file of the same name")
        masks = [named[path.stem] for path in files]
    elif len(masks) > 1:
        raise UserError(f"--mask={mask} is a directory, but --image={image} is one file; name one mask")
    read = {path: _read_mask(path, shape) for path in set(masks)}
    if len(masks) == 1:
        return pictures, np.repeat(read[masks[0]][None], len(pictures), axis=0)
    return pictures, np.stack([read[path] for path in masks])


def _files(where: Path, flag: str) -> list[Path]:
    if not where.is_dir():
        return [where]
    files = sorted(path for path in where.iterdir() if path.suffix.lower() in suffixes() and not path.name.startswith("."))
    if not files:
        raise UserError(f"{flag}={where} holds no image files")
    return files


def _read(path: Path, shape: tuple[int, int, int], background: str) -> np.ndarray:
    colour = parse_background(background)
    try:
        picture = read_whole(path, shape[2], colour)
    except Exception as e:
        # Pillow raises many kinds for many kinds of damage; to the user they are one.
        raise UserError(f"cannot read the image {printable(path)}: {e}") from e
    if picture.shape != tuple(shape):
        its, wanted = (f"{width} x {height}" for height, width in (picture.shape[:2], shape[:2]))
        raise UserError(f"{printable(path)} has {its} pixels, but this run draws {wanted}: scale and crop it first")
    return picture


def _read_mask(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """bool [H, W, 1], True where it is black."""
    mask = _read(path, (*shape[:2], 1), "white")
    return checked_mask(mask, printable(path))


def checked_mask(mask: np.ndarray, name: str) -> np.ndarray:
    """uint8 [..., H, W, 1], 255 where to fill and 0 where to keep -> bool, True where to keep.

    Raises:
      UserError: it has other values, or nothing is to be filled.
    """
    other = mask[(mask != 0) & (mask != 255)]
    if other.size:
        raise UserError(f"{name} has grey pixels ({other[0]}): a mask is white (255) where to fill and black (0) where to keep")
    if not mask.any():
        raise UserError(f"{name} is all black: there is nothing to fill")
    return mask == 0


def take_arrays(image: Any, mask: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """The same of arrays: uint8 [H, W, C] or [n, H, W, C], and bool [H, W] or [n, H, W], True where to fill, or None.

    Raises:
      UserError: they have another form.
    """
    image = np.asarray(image)
    pictures = image[None] if image.ndim == 3 else image
    if pictures.dtype != np.uint8 or pictures.shape[1:] != tuple(shape) or not len(pictures):
        raise UserError(f"image: {image.dtype} {list(image.shape)}, but uint8 {list(shape)} or [n, ...] is needed")
    if mask is None:
        return pictures, None
    fill = np.asarray(mask)
    if fill.dtype != bool or fill.shape not in (shape[:2], (len(pictures), *shape[:2])):
        raise UserError(f"mask: {fill.dtype} {list(fill.shape)}, but bool {list(shape[:2])} is needed, True where to fill")
    keep = np.broadcast_to(~fill[..., None], (*pictures.shape[:3], 1))
    if keep.all(axis=(1, 2, 3)).any():
        raise UserError("mask: it is False everywhere, so there is nothing to fill")
    return pictures, keep


def open_pictures(
    pictures: np.ndarray, keep: np.ndarray | None, plan: Plan, latent_shape: tuple[int, int, int], autoencoder: Autoencoder | None
) -> Pictures:
    """Pictures as the model sees them.

    Args:
      pictures: uint8 [n, H, W, C].
      keep: bool [n, H, W, 1], or None without a mask.
      latent_shape: of what the model draws.
      autoencoder: encodes them; None where the model draws pixels.
    """
    images = (pictures.astype(np.float32) / 127.5 - 1).astype(np.float32)
    if autoencoder is None:
        return Pictures(pictures, keep, images, keep, plan)
    known = None if keep is None else np.asarray(latent_mask(keep, latent_shape))
    return Pictures(pictures, keep, autoencoder.encode(images), known, plan)
