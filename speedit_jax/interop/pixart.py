"""PixArt-alpha's names (Chen et al., arXiv 2310.00426): in the published PyTorch code and in diffusers.

diffusers' PixArtTransformer2DModel, in its first releases a Transformer2DModel, splits qkv in three and kv in two. Left out are
the position table, which is computed, and y_embedding, the published code's random null caption: here as in diffusers the null
caption is the encoder's embedding of "".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop import dit
from speedit_jax.interop.dit import Architecture, shape_of
from speedit_jax.interop.layout import COMPUTED, Table, check

NULL_CAPTION = "y_embedder.y_embedding"
LENGTH = 120  # tokens of a caption, of T5 v1.1 XXL
GUIDANCE_SCALE = 4.5  # of diffusers' pipeline

_MODULES = {
    "patch": "x_embedder.proj",
    "timestep/hidden": "t_embedder.mlp.0",
    "timestep/out": "t_embedder.mlp.2",
    "adaLN_single": "t_block.1",
    "text/hidden": "y_embedder.y_proj.fc1",
    "text/out": "y_embedder.y_proj.fc2",
    "final_table": "final_layer.scale_shift_table",
    "final": "final_layer.linear",
}
_BLOCK_MODULES = {
    "adaLN_table": "scale_shift_table",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "cross/q": "cross_attn.q_linear",
    "cross/kv": "cross_attn.kv_linear",
    "cross/out": "cross_attn.proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
TABLE = Table(_MODULES, _BLOCK_MODULES)

# The published module -> diffusers': around the blocks, and in a block, where one may be split.
_DIFFUSERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.scale_shift_table": "scale_shift_table",
    "final_layer.linear": "proj_out",
}
_DIFFUSERS_BLOCK = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_DIFFUSERS_SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
}
_DIFFUSERS_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 128,
    "patch_size": 2,
}

# What the tensors of PixArt's other networks are called -> which those are.
_OTHERS = {
    "csize_embedder.": "the 1024 px PixArt-alpha, which is told the size of each image",
    "ar_embedder.": "the 1024 px PixArt-alpha, which is told the size of each image",
    "resolution_embedder.": "the 1024 px PixArt-alpha, which is told the size of each image",
    "aspect_ratio_embedder.": "the 1024 px PixArt-alpha, which is told the size of each image",
    ".q_norm.": "PixArt-Sigma",
    "attn.sr.": "PixArt-Sigma",
}


def is_pixart(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these are a PixArt's tensors under the published names."""
    return any(name.startswith("y_embedder.y_proj.") for name in state)


def is_pixart_config(config: Mapping[str, Any]) -> bool:
    """Whether diffusers' config.json is of a PixArt."""
    return config.get("_class_name") == "PixArtTransformer2DModel" or config.get("norm_type") == "ada_norm_single"


def refuse_others(names: Mapping[str, Any]) -> None:
    """Raises a UserError that names a tensor of one of PixArt's other networks."""
    for name in names:
        for part, which in _OTHERS.items():
            if part in name:
                raise UserError(f"it holds {name}, so it is {which}; only PixArt-alpha of 256 and 512 px can be imported")


def trained(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The published code's tensors without its null caption.

    Raises:
      UserError: they are of another PixArt.
    """
    refuse_others(state)
    if NULL_CAPTION in state and len(state[NULL_CAPTION]) != LENGTH:
        raise UserError(
            f"its {NULL_CAPTION} has {len(state[NULL_CAPTION])} tokens, so it is PixArt-Sigma; PixArt-alpha has {LENGTH}"
        )
    return {name: value for name, value in state.items() if name != NULL_CAPTION}


def describe(state: Mapping[str, np.ndarray]) -> Architecture:
    """The network of the published code's tensors; its heads are not among them.

    Raises:
      UserError: a tensor that tells it is missing.
    """
    network = dit.describe(state)
    _, width = shape_of(state, "y_embedder.y_proj.fc1.weight", 2)
    return _as_pixart(network, width)


def _as_pixart(network: Architecture, text_width: int, position_scale: float = 1.0) -> Architecture:
    return dataclasses.replace(
        network, adaln="single", text_width=text_width, text_length=LENGTH, label_rows=0, position_scale=position_scale
    )


def describe_diffusers(config: Mapping[str, Any]) -> Architecture:
    """The network of diffusers' config.json.

    Raises:
      UserError: it has a setting that ours does not have.
    """
    for key, wanted in _DIFFUSERS_SETTINGS.items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"config.json has {key}={config[key]!r}; only {wanted!r} is a PixArt")
    values = _DIFFUSERS_DEFAULTS | {key: value for key, value in config.items() if value is not None}
    size, patch = values["sample_size"], values["patch_size"]
    if values.get("use_additional_conditions", size == 128):
        raise UserError(f"config.json has use_additional_conditions, so it is {_OTHERS['csize_embedder.']}; take 256 or 512 px")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    if values.get("cross_attention_dim", width) != width or not values.get("caption_channels"):
        raise UserError("config.json has no caption_channels, or a cross_attention_dim other than its width")
    network = Architecture(
        backbone="DiT",
        width=width,
        depth=values["num_layers"],
        patch=patch,
        channels=values["in_channels"],
        out_channels=values["out_channels"],
        label_rows=0,
        tokens=(size // patch) ** 2,
        heads=values["num_attention_heads"],
    )
    scale = values.get("interpolation_scale") or max(size // 64, 1)
    return _as_pixart(network, values["caption_channels"], float(scale))


def diffusers_config(network: Architecture) -> dict[str, Any]:
    """config.json of the PixArtTransformer2DModel that is `network`, whose grid is square and whose heads are known."""
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels,
        "out_channels": network.out_channels,
        "num_layers": network.depth,
        "cross_attention_dim": network.width,
        "caption_channels": network.text_width,
        "sample_size": math.isqrt(network.tokens) * network.patch,
        "patch_size": network.patch,
        "num_embeds_ada_norm": 1000,
        "interpolation_scale": network.position_scale,
        "use_additional_conditions": False,
        **_DIFFUSERS_SETTINGS,
        "norm_eps": dit.NORM_EPS,
    }


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The published code's tensors under diffusers' names, without the position table."""
    renamed = {}
    for name, value in state.items():
        if name != COMPUTED:
            names = _diffusers_names(name)
            renamed |= zip(names, np.split(value, len(names)), strict=True)
    return renamed


def from_diffusers(state: Mapping[str, np.ndarray], like: Any, patch: int) -> Any:
    """Arranges diffusers' tensors as our parameters; arguments as of Table.from_torch.

    Raises:
      UserError: a tensor is missing, extra or of another shape, or they are of another PixArt.
    """
    refuse_others(state)
    shapes = TABLE.shapes(like, patch)
    # A scalar that pretends to be large: only its shape is used.
    wanted = to_diffusers({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
    given = {name: np.shape(value) for name, value in state.items() if name != dit.DIFFUSERS_COMPUTED}
    check(given, {name: value.shape for name, value in wanted.items()})
    joined = {name: np.concatenate([state[part] for part in _diffusers_names(name)]) for name in shapes}
    return TABLE.from_torch(joined, like, patch)


def _diffusers_names(name: str) -> list[str]:
    """The diffusers tensors that hold a published one: parts of its rows."""
    if not name.startswith("blocks."):
        return [_renamed(name, lambda module: (_DIFFUSERS[module],))[0]]
    _, layer, rest = name.split(".", 2)
    return [f"transformer_blocks.{layer}.{part}" for part in _renamed(rest, _DIFFUSERS_BLOCK.__getitem__)]


def _renamed(name: str, names_of) -> list[str]:
    """A table is its module; other tensors are the weight or the bias of one."""
    if name.endswith("scale_shift_table"):
        return list(names_of(name))
    module, _, parameter = name.rpartition(".")
    return [f"{other}.{parameter}" for other in names_of(module)]
