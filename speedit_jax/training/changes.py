"""What may differ between a run and its continuation.

Every key of the config is in KEYS: by itself or, where one answer holds for all of a section, by its section.
"""

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

from speedit_jax.config import complete, flatten
from speedit_jax.diffusion.timesteps import PRESETS


class Kind(enum.Enum):
    FREE = "the weights do not depend on it"
    ROUNDING = "the weights depend on it to rounding"
    DATA = "compared by the data themselves: their fingerprint, shape and class names"
    START = "used before the first step alone"
    CHANGES = "the run is another one from here on: with --continue_with_changes"
    FORM = "arrays have another form, so the state does not fit"


KEYS = {
    "init_from": Kind.START,
    "seed": Kind.CHANGES,
    "data.source": Kind.DATA,
    "data.split": Kind.DATA,
    "data.classes": Kind.DATA,
    "data.height": Kind.DATA,
    "data.width": Kind.DATA,
    "data.channels": Kind.DATA,
    "data.background": Kind.CHANGES,
    "data.vae": Kind.DATA,
    "data.text": Kind.DATA,
    "data.features": Kind.DATA,
    "data.mask": Kind.CHANGES,
    "data.mask_all": Kind.CHANGES,
    "data.flip": Kind.CHANGES,
    "data.max_broken": Kind.FREE,
    "data.threads": Kind.FREE,
    "data.synthetic_size": Kind.DATA,
    "data.synthetic_classes": Kind.DATA,
    "model.name": Kind.FORM,
    "model.width": Kind.FORM,
    "model.depth": Kind.FORM,
    "model.heads": Kind.FORM,
    "model.mlp_ratio": Kind.FORM,
    "model.time_freq_shift": Kind.CHANGES,
    "model.label_dropout": Kind.CHANGES,
    "model.text": Kind.FORM,
    "model.adaln": Kind.FORM,
    "model.position_scale": Kind.CHANGES,
    "model.qk_norm": Kind.FORM,
    "model.rope": Kind.CHANGES,
    "model.mlp": Kind.FORM,
    "model.patch_bottleneck": Kind.FORM,
    "model.attention": Kind.ROUNDING,
    "model.gla": Kind.ROUNDING,
    "model.directions": Kind.FORM,
    "model.convolution": Kind.START,
    "model.norm": Kind.FORM,
    "model.remat": Kind.ROUNDING,
    "model.scan_unroll": Kind.ROUNDING,
    "model.dtype": Kind.CHANGES,  # bfloat16 rounds as coarsely as that it shows in the curves
    "diffusion": Kind.CHANGES,
    "tokens": Kind.CHANGES,
    "regularizer": Kind.CHANGES,
    "timesteps": Kind.CHANGES,
    "optim": Kind.CHANGES,
    "training.num_steps": Kind.FREE,  # but for the cosine, which looks at where the run ends
    "training.batch_size": Kind.CHANGES,
    "training.accumulation": Kind.ROUNDING,
    "training.ema_decay": Kind.CHANGES,
    "training.extra_ema_decays": Kind.FORM,
    "training.ema_warmup": Kind.CHANGES,
    "training.log_every": Kind.FREE,
    "training.sample_every": Kind.FREE,
    "training.profile_at": Kind.FREE,
    "training.profile_steps": Kind.FREE,
    "training.wandb_project": Kind.FREE,
    "training.max_skipped_in_a_row": Kind.FREE,
    "training.hang_after": Kind.FREE,
    "checkpoint": Kind.FREE,
    "sampling": Kind.FREE,
    "evaluation": Kind.FREE,
    "mesh": Kind.ROUNDING,
}

# Key -> what "auto" stands for.
_AUTO = {"optim.decay_mask": "matrices"}

# Key -> what of its value the form of an array depends on.
_FORMS = {
    "data.mask": lambda kind: kind != "",  # the layer that takes the known part
    "model.label_dropout": lambda rate: rate > 0,  # the null label's row
    "model.convolution": lambda start: start == "none",
    "diffusion.variance": lambda variance: variance == "learned_range",  # the last layer's width
    # The fusion and the mask token, or the side-interpolater.
    "tokens.method": lambda method: method if method in ("sprint", "mask") else "",
    "optim.clip_norm": lambda norm: norm > 0,  # the optimizer's nesting
    "regularizer.align": lambda weight: weight > 0,  # the head between the networks
    "regularizer.align_target": lambda target: target,  # which head, where there is one
    "regularizer.align_head": lambda head: head,
}
# The sampling whose measured density is in the state, and what its form depends on besides.
_MEASURED = {"loss_second_moment": ("diffusion.num_steps",), "gradient_noise": ()}
_OF_MEASURED = ("timesteps.strategy", "timesteps.sampling", "diffusion.num_steps")


def is_of_the_network(key: str) -> bool:
    """Whether a key of kind FORM, or on which a form depends, is one of arrays that init_from does not start anew."""
    return key == "diffusion.variance" or (key.startswith("model.") and key != "model.label_dropout")


def kind_of(key: str) -> Kind:
    """Of a key "section.key"; of one that this version does not know CHANGES."""
    return KEYS.get(key) or KEYS.get(key.partition(".")[0], Kind.CHANGES)


@dataclasses.dataclass(frozen=True)
class Differences:
    """Between a run and what is to continue it: name -> [old, new].

    Attributes:
      rounding: what the weights depend on to rounding.
      changes: what makes it another run.
      misfits: what its state does not fit.
      late: what would have been used before the first step, and is not any more.
    """

    rounding: dict[str, list[Any]]
    changes: dict[str, list[Any]]
    misfits: dict[str, list[Any]]
    late: dict[str, list[Any]]


def compare(saved: dict[str, Any], wanted: dict[str, Any], older_fingerprints: Iterable[str], started: bool) -> Differences:
    """Compares two descriptions, as training.run.describe makes them.

    Args:
      saved: of the run.
      wanted: of its continuation.
      older_fingerprints: what earlier versions called the continuation's data.
      started: whether a step of the run is saved.
    """
    old, new = _settings(complete(saved["config"]).to_dict()), _settings(wanted["config"])
    different = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    found = {kind: {} for kind in Kind}
    for key, values in different.items():
        found[_kind(key, values, new, started)][key] = values
    changes, misfits = found[Kind.CHANGES], found[Kind.FORM]
    if _measured(old) != _measured(new):
        misfits |= {key: changes.pop(key) for key in _OF_MEASURED if key in changes}
    if saved["data_fingerprint"] not in (wanted["data_fingerprint"], *older_fingerprints):
        # The keys that name the data say more than two checksums.
        changes |= found[Kind.DATA] | {"data": [saved["data_fingerprint"], wanted["data_fingerprint"]]}
    if saved.get("image_shape") != wanted.get("image_shape"):
        misfits["image_shape"] = [saved.get("image_shape"), wanted.get("image_shape")]
    classes = [saved["class_names"], wanted["class_names"]]
    if len(classes[0]) != len(classes[1]):
        misfits["classes"] = [len(names) for names in classes]
    elif classes[0] != classes[1]:
        changes["class_names"] = classes
    if not same_latents(saved.get("latents"), wanted.get("latents")):
        misfits["latents"] = [(of.get("latents") or {}).get("vae", "none") for of in (saved, wanted)]
    if not same_text(saved.get("text"), wanted.get("text")):
        misfits["text"] = [(of.get("text") or {}).get("encoder", {}).get("encoder", "none") for of in (saved, wanted)]
    widths = [of["features"]["shape"][2] for of in (saved, wanted) if of.get("features")]
    if len(set(widths)) > 1:
        misfits["features"] = widths
    # Without init_from a run goes on as well: what it started from may be gone.
    late = {key: values for key, values in found[Kind.FREE].items() if kind_of(key) is Kind.START and values[1]}
    return Differences(found[Kind.ROUNDING], changes, misfits, late)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: _AUTO[key] if value == "auto" and key in _AUTO else value for key, value in flatten(config).items()}


def _measured(settings: dict[str, Any]) -> tuple:
    """What the form of a measured density is known by; () where none is."""
    sampling = settings["timesteps.sampling"] or PRESETS[settings["timesteps.strategy"]][0]
    return (sampling, *(settings[key] for key in _MEASURED[sampling])) if sampling in _MEASURED else ()


def _kind(key: str, values: list[Any], new: dict[str, Any], started: bool) -> Kind:
    kind = kind_of(key)
    if key in _FORMS and None not in values and _FORMS[key](values[0]) != _FORMS[key](values[1]):
        headless = key.startswith("regularizer.align_") and new["regularizer.align"] == 0
        return kind if headless else Kind.FORM
    if kind is Kind.START:
        return Kind.FREE if started else Kind.CHANGES
    if key == "training.num_steps" and new["optim.schedule"] != "constant":
        return Kind.CHANGES
    return kind


def same_latents(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two identities are of one autoencoder, wherever it lies; None is images."""
    if one is None or other is None:
        return one is other
    configs = [identity.get("config") or {} for identity in (one, other)]
    shared = configs[0].keys() & configs[1].keys()  # a version may know more of it than an earlier one
    return one["weights"] == other["weights"] and all(configs[0][key] == configs[1][key] for key in shared)


def same_text(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two runs' texts are of one encoder, wherever it lies, and of one form; None is no text."""
    if one is None or other is None:
        return one is other
    return same_encoder(one["encoder"], other["encoder"])


def same_encoder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one text encoder."""
    one, other = ({key: value for key, value in identity.items() if key != "encoder"} for identity in (one, other))
    return one == other


def recorded(meta: dict[str, Any]) -> list[tuple[int, dict[str, list[Any]]]]:
    """(step, NAME -> [old, new]) of each time that a run went on with changes, as its metadata say."""
    return [
        (change["step"], {name: values for name, values in change.items() if name != "step"})
        for change in meta.get("changes", [])
    ]


def spelled(different: dict[str, list[Any]], most: int = 3) -> str:
    """ "KEY was OLD, now NEW; ..." """
    said = [_spell(key, *values) for key, values in different.items()]
    return "; ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def _spell(key: str, old: Any, new: Any) -> str:
    if key == "data":
        return "the data has changed"
    if key == "latents":
        return f"the autoencoder has changed (was {old}, now {new})"
    if key == "text":
        return f"the text encoder has changed (was {old}, now {new})"
    if key == "features":
        return f"the width of data.features was {old}, now {new}"
    if key == "class_names":
        renamed = [f"{a!r} was {b!r}" for a, b in zip(new, old, strict=True) if a != b]
        return f"{len(renamed)} classes have other names ({', '.join(renamed[:2])})"
    return f"{key} was {old!r}, now {new!r}"
