"""Finds networks in what training code saves: by the one tensor that all of them have, under whatever prefix or container."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop.layout import COMPUTED
from speedit_jax.interop.pickles import Inert
from speedit_jax.interop.tensors import is_tensor

ANCHOR = "x_embedder.proj.weight"
# Names of averages: ema, ema_model, params_ema, model_ema, ema_0.9999, averaged_model, shadow, swa_model.
_AVERAGE = re.compile(r"(^|_)(ema|averaged?|shadow|swa)(_|$)")
# What an optimizer keeps for each tensor, under the tensors' own names.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "opt", "optim", "optimizer"}
_SETTINGS = ("args", "cfg", "config", "hparams", "hyper_parameters", "opts", "settings")
_USUAL = ("the top", "model", "ema")  # which need no word
_SHOWN = 3  # names in one message


@dataclasses.dataclass(frozen=True)
class Found:
    """The weights of a file.

    Attributes:
      raw, ema: name -> tensor; the same mapping where there is only one.
      notes: where they were found, for the user.
    """

    raw: Mapping[str, Any]
    ema: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def find(content: Mapping[Any, Any]) -> Found:
    """The network, raw and averaged, in nested mappings of tensors.

    Raises:
      UserError: there is none, or one cannot choose.
    """
    tensors = dict(_tensors(content))
    roots = [name.removesuffix(ANCHOR) for name in tensors if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    roots = [root for root in roots if not _MOMENTS & set(root.split("."))]
    if not roots:
        raise UserError(_nothing(content, tensors))
    averaged = [root for root in roots if any(_AVERAGE.search(part) for part in root.lower().split("."))]
    chosen = {"raw": [root for root in roots if root not in averaged], "ema": averaged}
    for some in chosen.values():
        if len(some) > 1:
            names = ", ".join(map(_shown, some))
            raise UserError(f"it holds several networks: {names}; save the one that is meant alone")
    states = {kind: _under(some[0], roots, tensors) for kind, some in chosen.items() if some}
    one = len(states) == 1
    notes = [
        f"the {'' if one else kind + ' '}weights are its tensors under {_shown(some[0])}"
        for kind, some in chosen.items()
        if some and _shown(some[0]) not in _USUAL
    ]
    absent = [str(key) for key in content if isinstance(key, str) and _AVERAGE.search(key.lower())] if not averaged else []
    absent += ["model"] if "model" in content and chosen["raw"] == [] else []
    if absent:
        notes.append(f"its {absent[0]!r} holds no network: the other weights stand for both, raw and ema")
    raw, ema = (states.get(kind, states.get(other)) for kind, other in (("raw", "ema"), ("ema", "raw")))
    # Averages are often of parameters alone, and the position table is none.
    if COMPUTED in raw and COMPUTED not in ema:
        ema = {COMPUTED: raw[COMPUTED], **ema}
    return Found(raw, ema, tuple(notes))


def _shown(root: str) -> str:
    return root.removesuffix(".") or "the top"


def _under(root: str, roots: list[str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors whose names begin with `root`, without those of another network further down."""
    below = tuple(other for other in roots if other != root and other.startswith(root))
    return {
        name.removeprefix(root): value
        for name, value in tensors.items()
        if name.startswith(root) and not (below and name.startswith(below))
    }


def _tensors(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors of nested mappings, the keys joined by dots."""
    for key, value in content.items():
        if is_tensor(value):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _nothing(content: Mapping[Any, Any], tensors: Mapping[str, Any]) -> str:
    if {"state", "param_groups"} <= content.keys():
        return "it is the state of an optimizer, without weights; give the file with the weights of the same training"
    if any(".emb.timestep_embedder." in name for name in tensors):
        return "its tensors have diffusers' names; place the config.json of its DiTTransformer2DModel beside it"
    if any(name.endswith("decoder.conv_in.weight") for name in tensors):
        return "it is an autoencoder; give it by --config.data.vae=DIR, beside the weights of a network"
    names = list(tensors) or [f"{key} ({type(value).__name__})" for key, value in content.items()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"missing {ANCHOR}, by which a DiT, SiT or DiG is known; it holds {', '.join(names[:_SHOWN]) or 'nothing'}{more}"


def saved_settings(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings saved beside the weights, by their last name: argparse's, dicts, dataclasses, OmegaConf's.

    What is said twice and differently is left out.
    """
    found: dict[str, Any] = {}
    unclear = set()
    for name, value in _leaves({key: content[key] for key in _SETTINGS if key in content}):
        if name in found and found[name] != value:
            unclear.add(name)
        found[name] = value
    return {name: value for name, value in found.items() if name not in unclear}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Inert):
        saved = value.saved if isinstance(value.saved, Mapping) else {}
        for key in ("_content", "_val"):  # OmegaConf's
            if key in saved:
                yield from _leaves(saved[key], name)
                return
        value = {**saved, **value}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, str | int | float | bool):
        yield name, value
