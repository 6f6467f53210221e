"""The config of a network that was trained elsewhere: what its file tells, what is chosen for it, and what the user says."""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from speedit_jax.conversion import scheduler
from speedit_jax.data.description import DescribedTexts, Description
from speedit_jax.errors import UserError
from speedit_jax.interop import pixart
from speedit_jax.interop.dit import Architecture
from speedit_jax.interop.layout import COMPUTED
from speedit_jax.interop.weights import Weights
from speedit_jax.models.build import SIZES

_GUIDED = {4: 3}  # latent channels -> how many of them the published samples guide; of others all are


def fill_config(
    config: ml_collections.ConfigDict, weights: Weights, network: Architecture, given: Mapping[str, Any]
) -> tuple[Description, list[str]]:
    """Makes `config` that of `network`; returns its images and classes, and lines on what was chosen. `given` wins.

    Raises:
      UserError: something that neither the file nor `given` tells.
    """
    around, lines = weights.around, []
    values = _architecture(config, network, given)
    learned = _learned_variance(network)
    vae = given.get("data.vae") or (str(around.autoencoder) if around.autoencoder else "")
    latents = network.channels > 3 or bool(vae)
    side = math.isqrt(network.tokens) * network.patch
    guided = 0 if weights.diffusers or network.text_width or not latents else _GUIDED.get(network.channels, 0)
    values |= {
        "model.time_freq_shift": weights.time_freq_shift,
        "diffusion.path": weights.path,
        "diffusion.variance": "learned_range" if learned else "fixed_large",
        "data.height": side,
        "data.width": side,
        "data.channels": network.channels,
        "data.vae": vae,
        "sampling.clip": not latents,
        "sampling.guidance_channels": guided,
    }
    if around.scheduler:
        found, told = scheduler.read(around.scheduler)
        values, lines = values | found, lines + told
    texts = None
    if network.text_width:
        values |= {"model.text": "cross", "sampling.guidance_scale": pixart.GUIDANCE_SCALE}
        null = (np.zeros((1, network.text_width), np.float16), 1)  # an encoder has its own, and none is here
        texts = DescribedTexts({"encoder": "", "pooled": False}, network.text_width, network.text_length, False, null)
    dropout, choice = _label_dropout(weights, network, given)
    config.update_from_flattened_dict(values | {"model.label_dropout": dropout} | dict(given))

    height, width = config.data.height, config.data.width
    patches = (height // network.patch) * (width // network.patch)
    if not patches or patches != (network.tokens or patches):
        told = (
            f"{COMPUTED} has {network.tokens} positions, not {height} x {width} pixels'" if network.tokens else f"no {COMPUTED}"
        )
        raise UserError(f"{told}: give the size of images or latents, --config.data.height=H --config.data.width=W")
    null = config.model.label_dropout > 0 and (network.label_rows > 0 or texts is not None)
    lines += [choice] if choice else []
    if null and latents and "sampling.guidance_channels" not in given:
        which = f"the first {guided} of {network.channels} channels, as in the published samples" if guided else "all channels"
        other = "0 guides all" if guided else "N guides the first N alone"
        lines.append(f"guidance acts on {which}; --config.sampling.guidance_channels={other}")
    if config.diffusion.path != "vp" and weights.reversed_time is None:
        lines.append("its time is taken as 0 at noise, as in SiT; if it is 1 at noise, as in REPA and LFM, add --reverse_time")
    classes = tuple(around.class_names.get(i, str(i)) for i in range(max(0, network.label_rows - null)))
    if extra := [number for number in around.class_names if not 0 <= number < len(classes)]:
        raise UserError(f"model_index.json has an id2label of class {extra[0]}, but the network has {len(classes)} classes")
    return Description((height, width, network.channels), classes, "imported", texts=texts), lines


def _architecture(config: ml_collections.ConfigDict, network: Architecture, given: Mapping[str, Any]) -> dict[str, Any]:
    """Names the network in `config`; the other keys of its size."""
    backbone, width, depth = network.backbone, network.width, network.depth
    heads = given.get("model.heads") or network.heads
    known = [
        size
        for size, values in SIZES[backbone].items()
        if values[:2] == (width, depth) and heads in (0, values[2]) and network.mlp_ratio == 4
    ]
    if not known and not heads:
        raise UserError(f"the number of heads cannot be read from the tensors (width {width}); give --config.model.heads=N")
    config.model.name = f"{backbone}-{known[0] if known else 'tiny'}/{network.patch}"
    sizes = (0, 0, 0) if known else (width, depth, heads)
    return {
        **dict(zip(("model.width", "model.depth", "model.heads"), sizes, strict=True)),
        "model.mlp_ratio": network.mlp_ratio,
        "model.adaln": network.adaln,
        "model.position_scale": network.position_scale,
        "model.norm": network.norm,
        "model.convolution": network.convolution,
    }


def _learned_variance(network: Architecture) -> bool:
    if network.out_channels not in (network.channels, 2 * network.channels):
        raise UserError(
            f"final_layer.linear.weight has {network.out_channels} output channels for {network.channels} input channels;"
            " expected as many or twice as many"
        )
    return network.out_channels != network.channels


def _label_dropout(weights: Weights, network: Architecture, given: Mapping[str, Any]) -> tuple[float, str]:
    """(config.model.label_dropout, a line where it was chosen without being told): 0 where every row is a class.

    Raises:
      UserError: one row, which may be either.
    """
    key, default = "model.label_dropout", 0.1
    rows, told = network.label_rows, weights.label_dropout
    trained = told if told and 0 < told < 1 else default
    if key in given:
        if rows == 1 and given[key]:
            raise UserError(f"its label table has one row, which is no class beside a null label: give --config.{key}=0")
        return given[key], ""
    if not rows or weights.diffusers:
        return default, ""
    if weights.num_classes in (rows, rows - 1):
        return (trained if weights.num_classes == rows - 1 else 0.0), ""
    if told is not None and (rows > 1 or not told):
        return (trained if told else 0.0), ""
    if rows == 1:
        raise UserError(f"its label table has one row, a class or the null label: give --config.{key}=0 for a class")
    return default, f"the last of its {rows} label rows is taken for the null label; --config.{key}=0 makes it a class"
