"""What a network needs to know of its data, where the data themselves are absent."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class DescribedTexts:
    """Has the attributes of a store of captions that training reads, and no captions.

    Attributes:
      identity: of the text encoder.
      width, length: E and L.
      pooled: each caption is one vector.
      null: the text "": (tokens [n, E], n).
    """

    identity: dict[str, Any]
    width: int
    length: int
    pooled: bool
    null: tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class DescribedFeatures:
    """Has the attribute of a store of features that training reads, and no features.

    Attributes:
      shape: (h, w, F), of an image's.
    """

    shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Description:
    """Has the attributes of a data source, and no records: for imported weights, and for compiling without data.

    Attributes:
      image_shape: (H, W, C) of images, or (h, w, C) of latents.
      class_names: empty where the data are unconditional.
      fingerprint: of the data.
      encoded_by: the identity of the autoencoder whose latents the data are; None for images.
      texts: the captions; None without any.
      features: of the images; None without any.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str = ""
    encoded_by: dict[str, Any] | None = None
    texts: DescribedTexts | None = None
    features: DescribedFeatures | None = None
