"""DiT's names: in the published PyTorch code, whose tensors SiT, fast-DiT and SpeeD share, and in diffusers.

diffusers' DiTTransformer2DModel splits qkv in three and keeps a copy of the timestep and label embedders in every block.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop.layout import COMPUTED, Table, check

MODULES = {
    "patch": "x_embedder.proj",
    "timestep/hidden": "t_embedder.mlp.0",
    "timestep/out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "final_adaLN": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
BLOCK_MODULES = {
    "adaLN": "adaLN_modulation.1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
TABLE = Table(MODULES, BLOCK_MODULES)

# The published module -> diffusers': around the blocks, in a block, and the embedders, which every block has again.
_DIFFUSERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_LABELS = "y_embedder.embedding_table.weight"
_DIFFUSERS_LABELS = ".class_embedder.embedding_table.weight"
_QKV = ("to_q", "to_k", "to_v")
_DIFFUSERS_SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
_DIFFUSERS_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
NORM_EPS = 1e-6  # of the published code and ours; diffusers' own default for a block's second norm is 1e-5
DIFFUSERS_COMPUTED = "pos_embed.pos_embed"  # older versions stored it


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a state_dict tells of its network.

    Attributes:
      backbone: "DiT" or "DiG".
      width, depth, patch, channels: D, N, P and C.
      out_channels: C, or 2C with a learned variance.
      label_rows: of the label table, the null label's included; 0 is unconditional.
      tokens: of the position table; 0 where it is not stored.
      heads: 0 where the shapes do not tell.
      mlp_ratio: hidden width of DiT's MLP in D.
      norm, convolution: DiG's.
      adaln, position_scale: as config.model's.
      text_width, text_length: E and L of captions; 0 without text.
    """

    backbone: str
    width: int
    depth: int
    patch: int
    channels: int
    out_channels: int
    label_rows: int
    tokens: int
    heads: int = 0
    mlp_ratio: float = 4.0
    norm: str = "layer"
    convolution: str = "identity"
    adaln: str = "block"
    position_scale: float = 1.0
    text_width: int = 0
    text_length: int = 0


def shape_of(state: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    """Raises a UserError where there is no such tensor of so many axes."""
    if name not in state:
        raise UserError(f"missing {name}")
    if np.ndim(state[name]) != ndim:
        raise UserError(f"{name} has shape {np.shape(state[name])}, not {ndim} axes")
    return np.shape(state[name])


def describe_shell(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What all backbones share: the fields of Architecture that their shell's tensors tell.

    Raises:
      UserError: a tensor that tells one is missing or has another number of axes.
    """
    width, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", 4)
    outputs, _ = shape_of(state, "final_layer.linear.weight", 2)
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    return {
        "width": width,
        "depth": max((int(layer[1]) + 1 for layer in layers if layer), default=0),
        "patch": patch,
        "channels": channels,
        "out_channels": outputs // patch**2,
        "label_rows": shape_of(state, _LABELS, 2)[0] if _LABELS in state else 0,
        "tokens": shape_of(state, COMPUTED, 3)[1] if COMPUTED in state else 0,
    }


def describe(state: Mapping[str, np.ndarray]) -> Architecture:
    """The network of the published code's tensors; its heads are not among them.

    Raises:
      UserError: as `describe_shell`.
    """
    shell = describe_shell(state)
    hidden, _ = shape_of(state, "blocks.0.mlp.fc1.weight", 2)
    ratio = hidden / shell["width"]
    # The model truncates width times ratio, which must not fall below the hidden width.
    ratio = ratio if int(shell["width"] * ratio) == hidden else math.nextafter(ratio, math.inf)
    return Architecture(backbone="DiT", mlp_ratio=ratio, **shell)


def describe_diffusers(config: Mapping[str, Any]) -> Architecture:
    """The network of a DiTTransformer2DModel's config.json.

    Raises:
      UserError: another model, or one with a setting that ours does not have.
    """
    if config.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"config.json is of a {config.get('_class_name')}, not a DiTTransformer2DModel")
    for key, wanted in _DIFFUSERS_SETTINGS.items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"config.json has {key}={config[key]!r}; only {wanted!r} is a DiT")
    values = _DIFFUSERS_DEFAULTS | {key: value for key, value in config.items() if value is not None}
    grid = values["sample_size"] // values["patch_size"]
    return Architecture(
        backbone="DiT",
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        patch=values["patch_size"],
        channels=values["in_channels"],
        out_channels=values.get("out_channels", values["in_channels"]),
        label_rows=values["num_embeds_ada_norm"] + 1,
        tokens=grid**2,
        heads=values["num_attention_heads"],
    )


def diffusers_config(network: Architecture) -> dict[str, Any]:
    """config.json of the DiTTransformer2DModel that is `network`, whose grid is square and whose heads are known."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels,
        "out_channels": network.out_channels,
        "num_layers": network.depth,
        "sample_size": math.isqrt(network.tokens) * network.patch,
        "patch_size": network.patch,
        "num_embeds_ada_norm": network.label_rows - 1,
        **_DIFFUSERS_SETTINGS,
        "norm_eps": NORM_EPS,
    }


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The published code's tensors under diffusers' names, without the position table."""
    layers = range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")))
    renamed = {}
    for name, value in state.items():
        if name == COMPUTED:
            continue
        names = _diffusers_names(name, layers)
        renamed |= zip(names, np.split(value, 3) if ".qkv." in name else [value] * len(names), strict=True)
    return renamed


def with_padding(state: Mapping[str, np.ndarray], classes: int) -> dict[str, np.ndarray]:
    """The published code's tensors with a label table of classes + 1 rows, the null label's also for the classes that lack."""
    table = state[_LABELS]
    return {**state, _LABELS: np.concatenate([table[:-1], np.repeat(table[-1:], classes + 2 - len(table), axis=0)])}


def without_padding(state: Mapping[str, np.ndarray], classes: int) -> tuple[dict[str, np.ndarray], int]:
    """diffusers' tensors with `classes` + 1 rows of labels, and `classes`; as they are, and 0, unless the others are padding."""
    tables = {name: value for name, value in state.items() if name.endswith(_DIFFUSERS_LABELS)}
    for value in tables.values():
        if len(value) <= classes + 1 or (value[classes:] != value[-1]).any():
            return dict(state), 0
    return {**state, **{name: value[: classes + 1] for name, value in tables.items()}}, classes


def from_diffusers(state: Mapping[str, np.ndarray], like: Any, patch: int) -> Any:
    """Arranges diffusers' tensors as our parameters; arguments as of Table.from_torch.

    Raises:
      UserError: a tensor is missing, extra or of another shape, or the blocks' embedders differ.
    """
    shapes = TABLE.shapes(like, patch)
    # A scalar that pretends to be large: only its shape is used.
    wanted = to_diffusers({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
    given = {name: np.shape(value) for name, value in state.items() if name != DIFFUSERS_COMPUTED}
    check(given, {name: value.shape for name, value in wanted.items()})
    layers = range(1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")))
    joined = {}
    for name in shapes:
        first, *others = names = _diffusers_names(name, layers)
        if ".qkv." in name:
            joined[name] = np.concatenate([state[part] for part in names])
            continue
        different = [other for other in others if not np.array_equal(state[first], state[other])]
        if different:
            raise UserError(f"{different[0]} is not {first}: here all blocks share one embedder")
        joined[name] = state[first]
    return TABLE.from_torch(joined, like, patch)


def _diffusers_names(name: str, layers: range) -> list[str]:
    """The diffusers tensors that hold a published one: three for qkv, one a layer for the embedders."""
    module, _, parameter = name.rpartition(".")
    if module in _EMBEDDERS:
        return [f"transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[module]}.{parameter}" for i in layers]
    if not module.startswith("blocks."):
        return [f"{_DIFFUSERS[module]}.{parameter}"]
    _, layer, module = module.split(".", 2)
    modules = [f"attn1.{part}" for part in _QKV] if module == "attn.qkv" else [_DIFFUSERS[module]]
    return [f"transformer_blocks.{layer}.{module}.{parameter}" for module in modules]
