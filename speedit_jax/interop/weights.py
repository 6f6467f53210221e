"""What a file or directory of weights holds, of which program and with which settings."""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop import containers, dig, directories, dit, model_hub, own, pipeline, pixart, tensors
from speedit_jax.interop.dit import Architecture
from speedit_jax.interop.layout import COMPUTED

# What the published codes write of a flow's path -> config.diffusion.path.
_SIT_PATHS = {"Linear": "linear", "GVP": "gvp"}
_REPA_PATHS = {"linear": "linear", "cosine": "gvp"}
_PROJECTORS = "projectors."  # REPA's, of training alone
_DROPOUT = ("class_dropout_prob", "label_dropout", "cfg_prob")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was found.

    Attributes:
      raw, ema: name -> array; the same mapping where there is only one.
      diffusers: config.json of diffusers' DiT or PixArt, whose names the tensors then have; {} for those of the published codes.
      around: the pipeline around it.
      num_classes, label_dropout: of training, where the file tells; None where it does not.
      path: config.diffusion.path.
      reversed_time: whether a flow's time is 1 at noise; None where the file does not tell.
      notes: what the user ought to know.
      run: config.json of a run, as interop/own.py describes it; {} for the weights of other programs.
    """

    raw: Mapping[str, np.ndarray]
    ema: Mapping[str, np.ndarray]
    diffusers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    around: pipeline.Surroundings = dataclasses.field(default_factory=pipeline.Surroundings)
    num_classes: int | None = None
    label_dropout: float | None = None
    path: str = "vp"
    reversed_time: bool | None = None
    notes: tuple[str, ...] = ()
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def time_freq_shift(self) -> int:
        """config.model.time_freq_shift."""
        return self.diffusers.get(pipeline.SHIFT, 1) if self.diffusers and not pixart.is_pixart_config(self.diffusers) else 0

    def describe(self, state: Mapping[str, np.ndarray]) -> Architecture:
        """The network of `raw` or `ema`.

        Raises:
          UserError: a tensor that tells it is missing, or a setting is not a DiT's.
        """
        if self.diffusers:
            return _of_diffusers(self.diffusers).describe_diffusers(self.diffusers)
        return _of(state).describe(state)


def read(path: Path) -> Weights:
    """What is at `path`.

    Raises:
      UserError: nothing, or nothing that we know.
    """
    if not path.exists():
        where = f"; for the Hugging Face hub, --from={model_hub.SCHEME}{path}" if model_hub.NAME.fullmatch(str(path)) else ""
        raise UserError(f"there is no such file or directory{where}")
    if not path.is_dir():
        content, config = directories.read_file(path), path.with_name(directories.CONFIG)
        if not any(str(name).startswith("transformer_blocks.") for name in content) or not config.is_file():
            return _published(content)
        return _diffusers(content, directories.read_json(config), pipeline.Surroundings())
    alone = (path / directories.CONFIG).is_file() or not (path / "transformer").is_dir()
    directory = path if alone else path / "transformer"
    config = directory / directories.CONFIG
    settings = directories.read_json(config) if config.is_file() else {}
    if own.is_ours(settings):
        return _of_run(directories.read(directory), settings)
    if "_class_name" not in settings:
        return _published(directories.read(directory))
    _of_diffusers(settings).describe_diffusers(settings)  # before reading what may be gigabytes of another model
    return _diffusers(directories.read(directory), settings, pipeline.Surroundings() if alone else pipeline.read(path))


def _published(content: Mapping[Any, Any]) -> Weights:
    """Tensors under the names of the published codes, and what their training wrote down."""
    found, settings = containers.find(content), containers.saved_settings(content)
    raw = tensors.arrays(found.raw)
    ema = raw if found.raw is found.ema else tensors.arrays(found.ema)
    notes, path, reversed_time = list(found.notes), "vp", None
    flow = settings.get("path_type")
    projectors = any(name.startswith(_PROJECTORS) for name in raw)
    if flow in _SIT_PATHS and settings.get("prediction", "velocity") == "velocity":
        path, reversed_time = _SIT_PATHS[flow], False
    elif flow in _REPA_PATHS and settings.get("prediction", "v") == "v":
        path, reversed_time = _REPA_PATHS[flow], True
    elif flow:
        raise UserError(
            f"its flow has path {flow} and predicts {settings.get('prediction')}; known are velocities of"
            f" {', '.join(_SIT_PATHS)} (SiT) and {', '.join(_REPA_PATHS)} (REPA)"
        )
    elif projectors:
        path, reversed_time = "linear", True
        notes.append("its projectors are REPA's, whose flow is linear unless --config.diffusion.path=gvp says otherwise")
    if projectors:
        notes.append("REPA's projectors, which only training uses, are left out")
    one = raw is ema
    ema = _trained(ema)
    dropout = next((settings[name] for name in _DROPOUT if name in settings), None)
    return Weights(
        raw=ema if one else _trained(raw),
        ema=ema,
        num_classes=settings["num_classes"] if isinstance(settings.get("num_classes"), int) else None,
        label_dropout=dropout if isinstance(dropout, int | float) else None,
        path=path,
        reversed_time=reversed_time,
        notes=tuple(notes),
    )


def _of_run(content: Mapping[Any, Any], settings: Mapping[str, Any]) -> Weights:
    """The tensors of a run: one kind of weights, which stands for both."""
    own.check_settings(settings)
    state = _trained(tensors.arrays(content))
    state.pop(COMPUTED, None)
    return Weights(state, state, run=settings)


def _trained(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each tensor of the network once."""
    state = {name: value for name, value in state.items() if not name.startswith(_PROJECTORS)}
    if dig.is_dig(state):
        return dig.without_aliases(state)
    return pixart.trained(state) if pixart.is_pixart(state) else state


def _of(state: Mapping[str, np.ndarray]) -> types.ModuleType:
    """Whose names these are, of the published codes."""
    return dig if dig.is_dig(state) else pixart if pixart.is_pixart(state) else dit


def _of_diffusers(config: Mapping[str, Any]) -> types.ModuleType:
    """Whose config.json this is, of diffusers' networks."""
    return pixart if pixart.is_pixart_config(config) else dit


def _diffusers(content: Mapping[Any, Any], config: Mapping[str, Any], around: pipeline.Surroundings) -> Weights:
    state, eps = tensors.arrays(content), config.get("norm_eps", 1e-5)
    if around.class_names:
        state, classes = dit.without_padding(state, max(around.class_names) + 1)
        config = {**config, "num_embeds_ada_norm": classes or config.get("num_embeds_ada_norm")}
    note = f"approximate: its second norms divide by sqrt(variance + {eps:g}), ours by sqrt(variance + {dit.NORM_EPS:g})"
    return Weights(state, state, config, around, notes=() if eps == dit.NORM_EPS else (note,))
