"""The autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), as diffusers' AutoencoderKL computes it, NHWC.

Modules bear diffusers' names, so that interop/vae.py needs no table. GroupNorm has an eps of 1e-6 everywhere. Parameters are
float32; statistics of norms and softmax are at least that.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.errors import UserError
from speedit_jax.interop import vae as files
from speedit_jax.models.attention import chunked_attention
from speedit_jax.models.build import DTYPES
from speedit_jax.models.tiling import tiled

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """What diffusers' config.json says of an AutoencoderKL; the defaults are diffusers'.

    Attributes:
      in_channels, out_channels: of images.
      latent_channels: C; the encoder returns 2C, means and log variances.
      block_out_channels: width at each resolution, the finest first; each but the last halves both sides.
      layers_per_block: residual blocks at each resolution; the decoder has one more.
      norm_num_groups: of GroupNorm.
      scaling_factor, shift_factor: see `to_latents`.
      use_quant_conv, use_post_quant_conv: a 1x1 convolution after the encoder, before the decoder.
      mid_block_add_attention: attention at the coarsest resolution.
      sample_size: side of a tile, in pixels.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 32

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VaeConfig":
        """From the contents of a config.json.

        Raises:
          UserError: a setting that this network does not have, or a value that makes no sense.
        """
        given = {f.name: _tuple(config[f.name]) for f in dataclasses.fields(cls) if f.name in config}
        widths = given.get("block_out_channels", cls.block_out_channels)
        levels = len(widths) if isinstance(widths, tuple) else 0
        fixed = {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        for key, value in config.items():
            if key in fixed:
                if _tuple(value) != fixed[key]:
                    raise UserError(f"VAE setting {key}={value!r} is not supported, only {fixed[key]!r}")
            # force_upcast is about float16, which nothing here computes in; other names are settings that we do not know.
            elif key not in given and key != "force_upcast" and not key.startswith("_") and value is not None:
                raise UserError(f"VAE setting {key}={value!r} is not supported")
        return cls(**given | {"shift_factor": given.get("shift_factor") or 0.0})  # diffusers writes null

    def __post_init__(self):
        for key in [f.name for f in dataclasses.fields(self) if f.type in (int, tuple[int, ...])]:
            value = getattr(self, key)
            values = value if key == "block_out_channels" else (value,)
            if not isinstance(values, tuple) or not values or not all(type(v) is int and v > 0 for v in values):
                raise UserError(f"VAE setting {key}={value!r}: must be positive and whole")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            widths, groups = self.block_out_channels, self.norm_num_groups
            raise UserError(f"VAE setting block_out_channels={widths!r}: must be multiples of norm_num_groups={groups}")
        for key in ("scaling_factor", "shift_factor"):
            if not isinstance(getattr(self, key), int | float):
                raise UserError(f"VAE setting {key}={getattr(self, key)!r}: must be a number")
        if not self.scaling_factor:
            raise UserError("VAE setting scaling_factor=0: must not be zero")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def to_latents(config: VaeConfig, z: jax.Array) -> jax.Array:
    """What the encoder means -> what the diffusion model sees, of about unit variance."""
    return (z - config.shift_factor) * config.scaling_factor


def from_latents(config: VaeConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `to_latents`."""
    return latents / config.scaling_factor + config.shift_factor


@dataclasses.dataclass(frozen=True)
class Vae:
    """An autoencoder as pure functions; each works on a batch that is sharded over any mesh axes.

    Attributes:
      init: key -> parameters, a nested dict of float32 arrays.
      encode: (params, images [B, H, W, 3] in [-1, 1], tile=False) -> (mean, logvar), each [B, h, w, C] float32, logvar clipped;
        not scaled: `to_latents` is for samples of it.
      decode: (params, latents [B, h, w, C] as the diffusion model sees them, tile=False) -> images [B, H, W, 3] float32.
        `tile` bounds the memory of images larger than config.sample_size: see models/tiling.py.
      config: the architecture.
      dtype: name of the activations' dtype.

    encode and decode raise UserError for shapes that do not fit, and for a sample_size that cannot be tiled.
    """

    init: Callable[[jax.Array], Any]
    encode: Callable[..., tuple[jax.Array, jax.Array]]
    decode: Callable[..., jax.Array]
    config: VaeConfig
    dtype: str


def build_vae(config: VaeConfig, dtype: str = "float32") -> Vae:
    """The autoencoder of `config`, with activations and matmul inputs in `dtype`.

    Raises:
      UserError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown VAE dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    # Under jax_enable_x64, where parameters may be float64, float32 means "the parameters' own".
    activations = None if dtype == "float32" and jax.config.jax_enable_x64 else DTYPES[dtype]
    down, channels = config.downsample, config.latent_channels
    encoder, decoder = Encode(config, activations), Decode(config, activations)

    def init(key):
        keys = jax.random.split(key)
        image, latent = jnp.zeros((1, down, down, config.in_channels)), jnp.zeros((1, 1, 1, channels))
        return encoder.init(keys[0], image)["params"] | decoder.init(keys[1], latent)["params"]

    def run(network, params, x, tile, scale_in, scale_out):
        def apply(x):
            # Accelerators round float32 matmul inputs unless told otherwise; who asks for float32 wants it.
            with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
                out = network.apply({"params": params}, x)
            return out.astype(jnp.promote_types(out.dtype, jnp.float32))

        side = config.sample_size // down
        if not tile or max(x.shape[1:3]) <= side * scale_in:
            return apply(x)
        if config.sample_size % (4 * down):
            raise UserError(f"VAE setting sample_size={config.sample_size}: tiles must be multiples of {4 * down} pixels")
        return tiled(apply, x, side, scale_in, scale_out)

    def encode(params, images, tile=False):
        _, height, width, depth = images.shape
        if depth != config.in_channels or height % down or width % down:
            raise UserError(
                f"the VAE takes images of {config.in_channels} channels and sides that are multiples of {down},"
                f" not {height}x{width} with {depth} channels"
            )
        mean, logvar = jnp.split(run(encoder, params, images, tile, down, 1), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(params, latents, tile=False):
        if latents.shape[-1] != channels:
            raise UserError(f"the VAE takes latents of {channels} channels, not {latents.shape[-1]}")
        return run(decoder, params, from_latents(config, latents), tile, 1, down)

    return Vae(init, encode, decode, config, dtype)


def load_vae(where: str, dtype: str = "float32") -> tuple[Vae, Any]:
    """The autoencoder that interop/vae.py finds at `where`, a directory or a name on the hub, and its parameters, NumPy arrays.

    Raises:
      UserError: see interop/vae.py, `VaeConfig.from_diffusers` and `build_vae`.
    """
    place = files.find_vae(where)
    vae = build_vae(VaeConfig.from_diffusers(files.read_config(place)), dtype)
    return vae, files.read_params(place, jax.eval_shape(vae.init, jax.random.key(0)))


def _conv(features: int, size: int, dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


def _norm(groups: int, dtype, name: str) -> nn.GroupNorm:
    # The difference of mean squares would cancel where a group's mean is large.
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """x + Conv(SiLU(Norm(Conv(SiLU(Norm(x)))))): [B, H, W, D] -> [B, H, W, width]; x is projected where D differs."""

    width: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = _conv(self.width, 3, self.dtype, "conv1")(nn.silu(_norm(self.groups, self.dtype, "norm1")(x)))
        h = _conv(self.width, 3, self.dtype, "conv2")(nn.silu(_norm(self.groups, self.dtype, "norm2")(h)))
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention of one head over all positions: [B, H, W, D] -> [B, H, W, D]."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        b, height, width, d = x.shape
        tokens = _norm(self.groups, self.dtype, "group_norm")(x).reshape(b, height * width, 1, d)
        q, k, v = (nn.Dense(d, dtype=self.dtype, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        # A large image has more tokens than any transformer here: 1024 pixels are 16384, whose logits would be 1 GB.
        out = nn.Dense(d, dtype=self.dtype, name="to_out_0")(chunked_attention(q, k, v))
        return x + out.reshape(x.shape)


class MidBlock(nn.Module):
    """The coarsest resolution: [B, H, W, D] -> [B, H, W, D]."""

    config: VaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width, groups = x.shape[-1], self.config.norm_num_groups
        x = ResnetBlock(width, groups, self.dtype, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(width, groups, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images [B, H, W, channels] -> [B, h, w, 2C]."""

    config: VaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        config, groups = self.config, self.config.norm_num_groups
        x = _conv(config.block_out_channels[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(config.block_out_channels):
            if i:
                # Its padding is on the right and the bottom only.
                down = nn.Conv(
                    x.shape[-1],
                    (3, 3),
                    strides=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"down_blocks_{i - 1}_downsamplers_0_conv",
                )
                x = down(x)
            for j in range(config.layers_per_block):
                x = ResnetBlock(width, groups, self.dtype, name=f"down_blocks_{i}_resnets_{j}")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        x = nn.silu(_norm(groups, self.dtype, "conv_norm_out")(x))
        return _conv(2 * config.latent_channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, C] -> images [B, H, W, channels]."""

    config: VaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        config, groups = self.config, self.config.norm_num_groups
        x = _conv(config.block_out_channels[-1], 3, self.dtype, "conv_in")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(config.block_out_channels)):
            if i:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = _conv(x.shape[-1], 3, self.dtype, f"up_blocks_{i - 1}_upsamplers_0_conv")(x)
            for j in range(config.layers_per_block + 1):
                x = ResnetBlock(width, groups, self.dtype, name=f"up_blocks_{i}_resnets_{j}")(x)
        x = nn.silu(_norm(groups, self.dtype, "conv_norm_out")(x))
        return _conv(config.out_channels, 3, self.dtype, "conv_out")(x)


class Encode(nn.Module):
    """Images [B, H, W, channels] -> moments [B, h, w, 2C]."""

    config: VaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = Encoder(self.config, self.dtype, name="encoder")(x)
        return _conv(2 * self.config.latent_channels, 1, self.dtype, "quant_conv")(x) if self.config.use_quant_conv else x


class Decode(nn.Module):
    """Unscaled latents [B, h, w, C] -> images [B, H, W, channels]."""

    config: VaeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        if self.config.use_post_quant_conv:
            x = _conv(self.config.latent_channels, 1, self.dtype, "post_quant_conv")(x)
        return Decoder(self.config, self.dtype, name="decoder")(x)
