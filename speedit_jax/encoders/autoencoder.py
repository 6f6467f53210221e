"""The autoencoder around a latent diffusion model: one set of weights, jitted over the batch of a mesh."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.errors import UserError
from speedit_jax.interop.vae import checksum, find_vae
from speedit_jax.models.vae import VaeConfig, load_vae, to_latents

# Of a channel of scaled latents. An autoencoder's scaling_factor is chosen for 1 over all of them (Rombach et al., G).
STD_RANGE = (0.3, 3.0)


def sample_posterior(key: jax.Array, moments: jax.Array) -> jax.Array:
    """mean + std * noise: moments [B, h, w, 2C], means and log variances -> [B, h, w, C]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


class Autoencoder:
    """Images [B, H, W, 3] in [-1, 1] to moments [B, h, w, 2C], and latents [B, h, w, C] to images.

    Args:
      where: a diffusers AutoencoderKL, as interop/vae.py finds it: a directory, or its name on the Hugging Face hub.
      mesh: its batch axes share the images; the weights are on every device.
      dtype: of activations: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or "bfloat16".
      tile: in overlapping tiles, for images that do not fit.

    Attributes:
      identity: JSON that says whose latents these are: {"vae": where, "weights": checksum, "config": of the architecture}.
      dtype: of activations.
      channels: of latents.
      directory: where its files are, as interop/vae.py's `find_vae` gives it.
    """

    def __init__(self, where: str, mesh: Mesh, dtype: str = "auto", tile: bool = False):
        dtype = {"auto": "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"}.get(dtype, dtype)
        vae, params = load_vae(where, dtype)
        self._mesh, self.dtype, self.channels = mesh, dtype, vae.config.latent_channels
        self._host_params = params
        self._rows = sharding.batch_sharding(mesh)
        self.directory = find_vae(where)
        config = json.loads(json.dumps(dataclasses.asdict(vae.config)))  # as it will be read again: lists for tuples
        self.identity: dict[str, Any] = {"vae": where, "weights": checksum(self.directory), "config": config}

        def encode(params, images):
            return jnp.concatenate(vae.encode(params, images, tile=tile), axis=-1)

        self._encode = jax.jit(encode, in_shardings=(None, self._rows), out_shardings=self._rows)

        def mean(params, images):
            return to_latents(vae.config, vae.encode(params, images, tile=tile)[0])

        self._mean = jax.jit(mean, in_shardings=(None, self._rows), out_shardings=sharding.replicated(mesh))

        def decode(params, latents):
            return vae.decode(params, jax.lax.with_sharding_constraint(latents, self._rows), tile=tile)

        self._decode = jax.jit(decode, out_shardings=sharding.replicated(mesh))

    @property
    def scale(self) -> str:
        """Its factors, for a person to read."""
        return _scale(self.identity)

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

    def check(self, identity: dict[str, Any]) -> None:
        """Raises a UserError unless `identity` is this autoencoder's, with the same scale."""
        if identity["weights"] != self.identity["weights"]:
            raise UserError(f"{self.identity['vae']} is not the autoencoder of these latents, which {identity['vae']} encoded")
        if _scale(identity) != self.scale:
            raise UserError(
                f"{self.identity['vae']} has {self.scale}, but these latents have {_scale(identity)}: correct its config.json,"
                " or, for stored latents, run speedit_jax.encode again, which takes over the scale and encodes nothing anew"
            )

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

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, H, W, 3] -> the means of their latents as the diffusion model sees them, [n, h, w, C]."""
        size, latents = sharding.batch_devices(self._mesh), []
        with jax.set_mesh(self._mesh):
            for first in range(0, len(images), size):
                rows = np.arange(first, first + size) % len(images)  # the last are filled up, so that one compilation serves
                latents.append(np.asarray(self._mean(self._params, sharding.from_host(self._rows, images[rows]))))
        return np.concatenate(latents)[: len(images)]

    def decode(self, latents: jax.Array | np.ndarray) -> jax.Array:
        """Images [B, H, W, 3] float32, of latents as the diffusion model sees them; the mesh divides B.

        Both are whole on every device; it returns before they are computed.
        """
        with jax.set_mesh(self._mesh):
            return self._decode(self._params, latents)


def open_autoencoder(
    given: str | None, encoded_by: dict[str, Any] | None, channels: int, mesh: Mesh, dtype: str = "auto", tile: bool = False
) -> Autoencoder | None:
    """What decodes a run's latents; None where neither the run nor the user knows of any, or the user says "none".

    Args:
      given: --vae, in place of where it was in training.
      encoded_by: of what autoencoder the run's data were, as far as it knows.
      channels: of what the run draws.
      dtype, tile: as for `Autoencoder`.

    Raises:
      UserError: it is not there, or it is another one.
    """
    if given == "none" or (encoded_by is None and not given):
        return None
    try:
        autoencoder = Autoencoder(given or encoded_by["vae"], mesh, dtype, tile)
    except UserError as e:
        raise UserError(str(e) if given else f"{e}, with --vae; --vae=none draws the latents alone") from e
    if encoded_by:
        autoencoder.check(encoded_by)
    elif autoencoder.channels != channels:
        raise UserError(f"--vae={given} has latents of {autoencoder.channels} channels, but this run has latents of {channels}")
    return autoencoder


def latents_of(identity: dict[str, Any], key: jax.Array, moments: jax.Array) -> jax.Array:
    """What the diffusion model trains on, [B, h, w, C]: a sample of the posterior of the autoencoder `identity`, scaled."""
    return to_latents(VaeConfig.from_diffusers(identity["config"]), sample_posterior(key, moments))


def pixels_of_latent(identity: dict[str, Any]) -> int:
    """How many pixels, along one side, a latent of the autoencoder `identity` stands for."""
    return VaeConfig.from_diffusers(identity["config"]).downsample


def _scale(identity: dict[str, Any]) -> str:
    config = VaeConfig.from_diffusers(identity["config"])
    return f"scaling_factor={config.scaling_factor:g}, shift_factor={config.shift_factor:g}"


def scaled_statistics(header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) per channel, [C] each, of what the diffusion model trains on.

    Args:
      header: of stored latents (data/latents.py), whose own statistics are before scaling.
    """
    config = VaeConfig.from_diffusers(header["latents"]["config"])
    mean, std = (np.asarray(header[name], np.float64) for name in ("mean", "std"))
    return to_latents(config, mean), abs(config.scaling_factor) * std


def scale_warning(header: dict[str, Any]) -> str | None:
    """One line where a channel's scaled standard deviation lies outside STD_RANGE; noise schedules expect about 1."""
    _, std = scaled_statistics(header)
    if STD_RANGE[0] <= std.min() and std.max() <= STD_RANGE[1]:
        return None
    unscaled = np.sqrt(np.mean(np.square(header["std"])))
    return (
        f"the scaled latents have a standard deviation of {std.min():.3g} to {std.max():.3g} by channel, and about 1 is expected."
        f" Check {_scale(header['latents'])} in config.json of {header['latents']['vae']}: scaling_factor should be about one"
        f" over {unscaled:.3g}, the unscaled one. Then run speedit_jax.encode again, which takes over the scale and encodes"
        " nothing anew"
    )
