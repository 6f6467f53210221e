"""The autoencoder around a latent diffusion model: one set of weights, jitted over the batch of a mesh."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.errors import UserError
from speedit_jax.interop.vae import WEIGHTS, find_vae
from speedit_jax.models.vae import VaeConfig, load_vae, to_latents


def sample_posterior(key: jax.Array, moments: jax.Array) -> jax.Array:
    """mean + std * noise: moments [B, h, w, 2C], means and log variances -> [B, h, w, C]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


class Autoencoder:
    """Images [B, H, W, 3] in [-1, 1] to moments [B, h, w, 2C], and latents [B, h, w, C] to images.

    Args:
      where: a diffusers AutoencoderKL directory, or its name on the Hugging Face hub.
      mesh: its batch axes share the images; the weights are on every device.
      dtype: of activations: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or "bfloat16".
      tile: in overlapping tiles, for images that do not fit.

    Attributes:
      identity: JSON that says whose latents these are: {"vae": where, "weights": checksum, "config": of the architecture}.
      dtype: of activations.
      channels: of latents.
      directory: where its files are.
    """

    def __init__(self, where: str, mesh: Mesh, dtype: str = "auto", tile: bool = False):
        dtype = {"auto": "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"}.get(dtype, dtype)
        vae, params = load_vae(where, dtype)
        self._mesh, self.dtype, self.channels = mesh, dtype, vae.config.latent_channels
        self._host_params = params
        self._rows = sharding.batch_sharding(mesh)
        self.directory = find_vae(where)
        with (self.directory / WEIGHTS).open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        config = json.loads(json.dumps(dataclasses.asdict(vae.config)))  # as it will be read again: lists for tuples
        self.identity: dict[str, Any] = {"vae": where, "weights": checksum, "config": config}

        def encode(params, images):
            return jnp.concatenate(vae.encode(params, images, tile=tile), axis=-1)

        self._encode = jax.jit(encode, in_shardings=(None, self._rows), out_shardings=self._rows)

        def decode(params, latents):
            return vae.decode(params, jax.lax.with_sharding_constraint(latents, self._rows), tile=tile)

        self._decode = jax.jit(decode, out_shardings=sharding.replicated(mesh))

    @functools.cached_property
    def _params(self) -> Any:
        """On the devices, from the first use on: those that `lower` compiles for may be absent."""
        return jax.device_put(self._host_params, sharding.replicated(self._mesh))

    def lower(self, image_shape: tuple[int, int, int], batch: int, decode: bool = False) -> jax.stages.Lowered:
        """The encoder of `batch` images of (H, W, 3), or the decoder to them, lowered on shapes alone."""
        shape = self.latent_shape(image_shape) if decode else image_shape
        everywhere = sharding.replicated(self._mesh)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), self._host_params)
        # The decoder takes what the sampler leaves: whole on every device.
        rows = jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=everywhere if decode else self._rows)
        with jax.set_mesh(self._mesh):
            return (self._decode if decode else self._encode).lower(params, rows)

    def check(self, latents: dict[str, Any]) -> None:
        """Raises a UserError unless `latents`, an identity, is this autoencoder's."""
        if latents["weights"] != self.identity["weights"]:
            raise UserError(f"{self.identity['vae']} is not the autoencoder of these latents, which {latents['vae']} encoded")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, 3) -> (h, w, C).

        Raises:
          UserError: images that the autoencoder does not take.
        """
        shape = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        _, h, w, channels = jax.eval_shape(self._encode.__wrapped__, self._host_params, shape).shape
        return h, w, channels // 2

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(h, w, C) -> (H, W, 3)."""
        shape = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
        return jax.eval_shape(self._decode.__wrapped__, self._host_params, shape).shape[1:]

    def moments(self, images: jax.Array) -> jax.Array:
        """The posterior of a batch that is on the mesh."""
        with jax.set_mesh(self._mesh):
            return self._encode(self._params, images)

    def decode(self, latents: jax.Array | np.ndarray) -> jax.Array:
        """Images [B, H, W, 3] float32, of latents as the diffusion model sees them; the mesh divides B.

        Both are whole on every device; it returns before they are computed.
        """
        with jax.set_mesh(self._mesh):
            return self._decode(self._params, latents)


def open_autoencoder(
    given: str | None, latents: dict[str, Any] | None, channels: int, mesh: Mesh, dtype: str = "auto", tile: bool = False
) -> Autoencoder | None:
    """What decodes a run's latents; None where neither the run nor the user knows of any, or the user says "none".

    Args:
      given: --vae, in place of where it was in training.
      latents: of what autoencoder the run's data were, as far as it knows.
      channels: of what the run draws.
      dtype, tile: as for `Autoencoder`.

    Raises:
      UserError: it is not there, or it is another one.
    """
    if given == "none" or (latents is None and not given):
        return None
    try:
        autoencoder = Autoencoder(given or latents["vae"], mesh, dtype, tile)
    except UserError as e:
        raise UserError(str(e) if given else f"{e}, with --vae; --vae=none draws the latents alone") from e
    if latents:
        autoencoder.check(latents)
    elif autoencoder.channels != channels:
        raise UserError(f"--vae={given} has latents of {autoencoder.channels} channels, but this run draws {channels}")
    return autoencoder


def latents_of(identity: dict[str, Any], key: jax.Array, moments: jax.Array) -> jax.Array:
    """What the diffusion model trains on, [B, h, w, C]: a sample of the posterior of the autoencoder `identity`, scaled."""
    return to_latents(VaeConfig.from_diffusers(identity["config"]), sample_posterior(key, moments))
