"""Examples of the data with a part hidden, for a run with data.mask to fill: what its grids show."""

import jax
import numpy as np

from speedit_jax import sharding
from speedit_jax.data import loader
from speedit_jax.data.image_sets import EvenlySpaced
from speedit_jax.data.sources import Source
from speedit_jax.diffusion.inverse import Plan
from speedit_jax.diffusion.masks import draw_known
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.models.vae import VaeConfig, to_latents
from speedit_jax.sampling.conditions import Conditions, Labels, stored_prompts
from speedit_jax.sampling.images import to_uint8
from speedit_jax.sampling.known import Pictures, open_pictures
from speedit_jax.training.assembly import Assembly


def masked_examples(parts: Assembly, source: Source, count: int) -> tuple[Pictures, Conditions] | None:
    """`count` examples, evenly spaced, with fixed masks, some part of each hidden; and their own classes or first captions.

    None where they are latents that nothing decodes: there are no pictures then.
    """
    count, data, autoencoder = min(count, len(source)), parts.config.data, parts.autoencoder
    if parts.encoded_by and not autoencoder:
        return None
    records = next(loader.in_order(EvenlySpaced(source, count), 0, count, count, data.threads))
    if "moments" in records:
        # Of the image, not of its mirror image; and the mean of the posterior.
        images = _decoded(autoencoder, records["moments"][:, 0], sharding.batch_devices(parts.mesh))
    else:
        images = records["image"]
    known = draw_known(jax.random.key(parts.config.seed), count, images.shape[1:3], data.mask, 0.0)
    pictures = open_pictures(to_uint8(images), np.asarray(known), Plan("network"), parts.model.image_shape, autoencoder)
    return pictures, stored_prompts(parts.texts, count) if parts.texts else Labels(records["label"].astype(np.int32))


def _decoded(autoencoder: Autoencoder, moments: np.ndarray, batch: int) -> np.ndarray:
    """[n, h, w, 2C] -> [n, H, W, 3], a few at a time."""
    mean, _ = np.split(moments, 2, axis=-1)
    latents = to_latents(VaeConfig.from_diffusers(autoencoder.identity["config"]), mean.astype(np.float32))
    # The last batch is filled up, as often as it takes: there may be more devices than examples.
    padded = latents[np.arange(len(latents) + -len(latents) % batch) % len(latents)]
    decoded = [np.asarray(autoencoder.decode(padded[i : i + batch])) for i in range(0, len(padded), batch)]
    return np.concatenate(decoded)[: len(latents)]
