"""Features of images, for evaluation: extracted batch by batch over a mesh, and kept no longer than a metric needs them."""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from speedit_jax import sharding, storage
from speedit_jax.data.image_sets import Images
from speedit_jax.encoders.clip import ClipEncoder
from speedit_jax.errors import UserError
from speedit_jax.metrics.frechet import Moments
from speedit_jax.models.inception import OUTPUTS, load_inception

MOST_PIXELS = 4096  # numbers of an image: their covariance is 128 MB


class Pixels:
    """Numbers of images as they are, 0 to 1 and flattened: {"pool": [B, H * W * C]}.

    Comparable only among images of one size; for those of a few pixels, where no network is needed.

    Attributes:
      outputs: name -> D, as for Inception.
    """

    name = "pixels"
    identity = None

    def __init__(self, shape: tuple[int, int, int]):
        self.outputs = {"pool": int(np.prod(shape))}
        if self.outputs["pool"] > MOST_PIXELS:
            raise UserError(
                f"images of {'x'.join(map(str, shape))} have more than {MOST_PIXELS} values; use inception features for"
                " larger images"
            )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"pool": images.reshape(len(images), -1) / np.float32(255)}


class Inception:
    """uint8 [B, H, W, 1 or 3] to what models/inception.py computes, the mesh dividing B; every process has all of it.

    Args:
      where: the weight file.

    Attributes:
      outputs: name -> D.
      identity: JSON that says which weights these are.
    """

    name = "inception"
    outputs = OUTPUTS

    def __init__(self, where: str | None, mesh: Mesh):
        apply, params = load_inception(where)
        self.identity = {"weights": storage.path(where).name, "sha256": storage.sha256(storage.path(where))}
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._rows = sharding.batch_sharding(mesh)
        self._apply = jax.jit(apply, in_shardings=(None, self._rows), out_shardings=sharding.replicated(mesh))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return jax.device_get(self._apply(self._params, sharding.from_host(self._rows, images)))


@dataclasses.dataclass(frozen=True)
class Collected:
    """What was asked for of a set of images.

    Attributes:
      moments: by output, "pool" or "spatial".
      arrays: by output, "pool" or "logits": float32 [n, D].
    """

    moments: dict[str, Moments]
    arrays: dict[str, np.ndarray]


def collect(
    images: Images,
    extractor: Pixels | Inception | ClipEncoder,
    moments: Collection[str],
    arrays: Collection[str],
    *,
    batch_size: int,
    threads: int,
    bar: tqdm,
) -> Collected:
    """Moments of some outputs of the extractor, in constant memory, and all numbers of others, in one pass.

    Args:
      batch_size: of images; the number of devices divides it.
      threads: that decode images.
      bar: counts the images.

    Raises:
      UserError: an image cannot be read, or features are not finite.
    """
    sums: dict[str, Moments] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    for batch in images.batches(batch_size, threads):
        # The last batch is filled up, so that one compilation serves.
        features = extractor(batch[np.arange(batch_size) % len(batch)])
        features = {name: features[name][: len(batch)] for name in {*moments, *arrays}}
        if not all(np.isfinite(values).all() for values in features.values()):
            raise UserError(f"{extractor.name} features are not finite; the weights may be damaged")
        for name in moments:
            new = Moments.of(features[name])
            sums[name] = sums[name].merge(new) if name in sums else new
        for name in arrays:
            parts[name].append(features[name])
        bar.update(len(batch))
    return Collected(sums, {name: np.concatenate(values) for name, values in parts.items()})
