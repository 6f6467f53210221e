"""CLIP's two towers (Radford et al. 2021, arXiv 2103.00020), for the CLIP score: images and texts to vectors that compare.

Modules are named so that interop/clip.py needs no table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.errors import UserError
from speedit_jax.interop import clip as files

_ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": lambda x: nn.gelu(x, approximate=False)}
_OLD_END = 2  # what configs of 2021 and 2022 give as the end of text; it is the highest number of a text, whatever they say


@dataclasses.dataclass(frozen=True)
class Tower:
    """What both towers have, under transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class TextTower(Tower):
    """The text tower; defaults, which a config.json may leave out, are those of ViT-B/32."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ImageTower(Tower):
    """The image tower; defaults as in TextTower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers, and E, the width of what they project to."""

    text: TextTower
    image: ImageTower
    projection_dim: int = 512

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """Raises a UserError where a transformers config is that of another network."""
        towers = []
        for tower, name in ((TextTower, "text_config"), (ImageTower, "vision_config")):
            given = {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
            found = tower(**{field.name: given[field.name] for field in dataclasses.fields(tower) if field.name in given})
            if found.hidden_act not in _ACTIVATIONS:
                raise UserError(f"{name}: hidden_act={found.hidden_act}; known are {', '.join(_ACTIVATIONS)}")
            towers.append(found)
        return cls(*towers, config.get("projection_dim", cls.projection_dim))


def _dense(features: int, name: str, bias: bool = True) -> nn.Dense:
    # float32 products on accelerators, too: a score must not depend on the device.
    return nn.Dense(features, bias, precision=jax.lax.Precision.HIGHEST, name=name)


def _norm(tower: Tower, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(tower.layer_norm_eps, use_fast_variance=False, name=name)


class _Layer(nn.Module):
    """x [n, L, D] -> [n, L, D], pre-LN; causal lets a token see itself and those before it."""

    tower: Tower
    causal: bool

    @nn.compact
    def __call__(self, x):
        tower, width = self.tower, self.tower.hidden_size
        heads = (*x.shape[:2], tower.num_attention_heads, width // tower.num_attention_heads)
        y = _norm(tower, "layer_norm1")(x)
        q, k, v = (_dense(width, f"self_attn.{name}_proj")(y).reshape(heads) for name in "qkv")
        logits = jnp.einsum("nqhk,nvhk->nhqv", q, k, precision="highest") * heads[-1] ** -0.5
        if self.causal:
            logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, jnp.finfo(logits.dtype).min)
        mixed = jnp.einsum("nhqv,nvhk->nqhk", nn.softmax(logits), v, precision="highest").reshape(x.shape)
        x = x + _dense(width, "self_attn.out_proj")(mixed)
        hidden = _dense(tower.intermediate_size, "mlp.fc1")(_norm(tower, "layer_norm2")(x))
        return x + _dense(width, "mlp.fc2")(_ACTIVATIONS[tower.hidden_act](hidden))


class _Text(nn.Module):
    """Numbers of tokens [n, L] -> [n, E]: the state of the end of the text, projected."""

    config: ClipConfig

    @nn.compact
    def __call__(self, numbers):
        tower = self.config.text
        words = nn.Embed(tower.vocab_size, tower.hidden_size, name="text_model.embeddings.token_embedding")
        places = nn.Embed(tower.max_position_embeddings, tower.hidden_size, name="text_model.embeddings.position_embedding")
        x = words(numbers) + places(jnp.arange(numbers.shape[1]))
        for i in range(tower.num_hidden_layers):
            x = _Layer(tower, causal=True, name=f"text_model.encoder.layers.{i}")(x)
        end = jnp.argmax(numbers if tower.eos_token_id == _OLD_END else numbers == tower.eos_token_id, axis=1)
        x = _norm(tower, "text_model.final_layer_norm")(x[jnp.arange(len(x)), end])
        return _dense(self.config.projection_dim, "text_projection", bias=False)(x)


class _Image(nn.Module):
    """Images [n, S, S, 3], normalised -> [n, E]: the state of the class token, projected."""

    config: ClipConfig

    @nn.compact
    def __call__(self, images):
        tower, patch = self.config.image, (self.config.image.patch_size,) * 2
        embed = nn.Conv(
            tower.hidden_size,
            patch,
            patch,
            "VALID",
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="vision_model.embeddings.patch_embedding",
        )
        x = embed(images).reshape(len(images), -1, tower.hidden_size)
        first = self.param("vision_model.embeddings.class_embedding", nn.initializers.normal(), (tower.hidden_size,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, len(first))), x], axis=1)
        places = nn.Embed(x.shape[1], tower.hidden_size, name="vision_model.embeddings.position_embedding")
        x = _norm(tower, "vision_model.pre_layrnorm")(x + places(jnp.arange(x.shape[1])))
        for i in range(tower.num_hidden_layers):
            x = _Layer(tower, causal=False, name=f"vision_model.encoder.layers.{i}")(x)
        x = _norm(tower, "vision_model.post_layernorm")(x[:, 0])
        return _dense(self.config.projection_dim, "visual_projection", bias=False)(x)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The towers as pure functions.

    Attributes:
      init: key -> parameters {"text", "image"}, float32.
      text: (params["text"], numbers of tokens int [n, L]) -> [n, E].
      image: (params["image"], normalised images [n, S, S, 3]) -> [n, E].
    """

    config: ClipConfig
    init: Callable[[jax.Array], Any]
    text: Callable[..., jax.Array]
    image: Callable[..., jax.Array]


def build_clip(config: ClipConfig) -> Clip:
    text, image = _Text(config), _Image(config)
    side, channels = config.image.image_size, config.image.num_channels

    def init(key):
        inputs = {"text": (text, jnp.zeros((1, 1), jnp.int32)), "image": (image, jnp.zeros((1, side, side, channels)))}
        return {name: tower.init(key, like)["params"] for name, (tower, like) in inputs.items()}

    def apply(tower):
        return lambda params, inputs: tower.apply({"params": params}, inputs)

    return Clip(config, init, apply(text), apply(image))


def load_clip(directory: Path) -> tuple[Clip, Any]:
    """The towers in a directory of transformers, and their parameters, NumPy arrays.

    Raises:
      UserError: it is of another kind, or its weights do not fit its config.
    """
    clip = build_clip(ClipConfig.of(files.read_config(directory)))
    return clip, files.read_params(directory, jax.eval_shape(clip.init, jax.random.key(0)))
