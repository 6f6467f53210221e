"""blobs: a captioned set that needs no files: "a COLOUR blob at the PLACE", in six colours at nine places.

Nine of the 54 pairs are the split "held_out", each place once and each colour once or twice: a model that has learned colours and
places, and not pairs, draws them too.
"""

import dataclasses

import numpy as np

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 200, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 220, 0),
    "purple": (160, 0, 200),
    "black": (0, 0, 0),
}
PLACES = {  # of the centre, from the top and from the left, in shares of the image
    "top left": (0.22, 0.22),
    "top": (0.22, 0.5),
    "top right": (0.22, 0.78),
    "left": (0.5, 0.22),
    "centre": (0.5, 0.5),
    "right": (0.5, 0.78),
    "bottom left": (0.78, 0.22),
    "bottom": (0.78, 0.5),
    "bottom right": (0.78, 0.78),
}
SPLITS = ("train", "held_out")
_RADIUS = 0.14  # standard deviation of a blob, in shares of the image
_SPREAD = 0.03  # how far its centre lies from the place's, at most


def is_held_out(colour: int, place: int) -> bool:
    """Whether the pair is one of the nine, along a diagonal of the table of colours and places."""
    return colour == place % len(COLOURS)


def pairs(split: str) -> list[tuple[int, int]]:
    """(colour, place) of a split's pairs, as numbers."""
    every = [(colour, place) for colour in range(len(COLOURS)) for place in range(len(PLACES))]
    return [pair for pair in every if is_held_out(*pair) == (split == "held_out")]


def caption(colour: int, place: int) -> str:
    return f"a {list(COLOURS)[colour]} blob at the {list(PLACES)[place]}"


def draw(colour: int, place: int, height: int, width: int, offset: np.ndarray, scale: float) -> np.ndarray:
    """A blob on white: [height, width, 3] float32 in [-1, 1].

    Args:
      offset: of its centre from the place's (down, right), in shares of the image.
      scale: of its radius.
    """
    y, x = ((np.arange(side) + 0.5) / side for side in (height, width))
    top, left = np.array(list(PLACES.values())[place]) + offset
    distance2 = (y[:, None] - top) ** 2 + (x[None] - left) ** 2
    blob = np.exp(-distance2 / (2 * (scale * _RADIUS) ** 2))[..., None]
    ink = np.array(list(COLOURS.values())[colour]) / 127.5 - 1
    return (1 + blob * (ink - 1)).astype(np.float32)


def recognise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(colour [n], place [n]) of the nearest of the 54 undisturbed blobs, by the mean square over pixels.

    Args:
      images: [n, H, W, 3] in [-1, 1].
    """
    every = [(colour, place) for colour in range(len(COLOURS)) for place in range(len(PLACES))]
    templates = np.stack([draw(*pair, *images.shape[1:3], np.zeros(2), 1.0) for pair in every])
    distances = np.stack([((images - template) ** 2).mean(axis=(1, 2, 3)) for template in templates])
    found = np.array(every)[distances.argmin(axis=0)]
    return found[:, 0], found[:, 1]


@dataclasses.dataclass(frozen=True)
class BlobSource:
    """Image i shows pair i of its split, in turn; its exact place and size are drawn from i. Its label is the pair's number."""

    encoded_by = None
    older_fingerprints = ()
    size: int
    image_shape: tuple[int, int, int]
    split: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(caption(*pair) for pair in pairs(self.split))

    @property
    def fingerprint(self) -> str:
        return f"blobs {self.split} {self.size}"

    @property
    def captions(self) -> list[list[str]]:
        """Of each image."""
        names = self.class_names
        return [[names[i % len(names)]] for i in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found = pairs(self.split)
        label = index % len(found)
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        offset, scale = rng.uniform(-_SPREAD, _SPREAD, 2), rng.uniform(0.9, 1.1)
        return {"image": draw(*found[label], *self.image_shape[:2], offset, scale), "label": np.int32(label)}
