"""A run's identity: what its directory says it is, so that no other run is continued or overwritten by mistake."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections

from configs import base
from speedit_jax import __version__
from speedit_jax.data.sources import Source
from speedit_jax.errors import UserError

# Sections and keys that may differ between a run and its continuation: they do not change what is computed.
_MAY_CHANGE = (
    "checkpoint",
    "evaluation",
    "mesh",
    "sampling",
    "data.threads",
    "data.vae",
    "training.log_every",
    "training.profile_at",
    "training.profile_steps",
    "training.sample_every",
    "training.wandb_project",
)


def describe(
    config: ml_collections.ConfigDict, source: Source, image_shape: tuple[int, int, int], latents: dict[str, Any] | None
) -> dict[str, Any]:
    """The JSON that a run's directory and each of its checkpoints carry: enough to sample without the config file.

    Args:
      image_shape: of what the model draws.
      latents: the identity of the autoencoder whose latents the model draws; None where it draws images.
    """
    return {
        # JSON knows no tuples: a run compares with what it reads back.
        "config": json.loads(json.dumps(config.to_dict())),
        "image_shape": list(image_shape),
        "latents": latents,
        "class_names": list(source.class_names),
        "data_fingerprint": source.fingerprint,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__},
    }


def config_of(meta: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config of a run; keys younger than the run have configs/base.py's defaults, which mean what was before them."""

    def over(defaults, saved):
        if not isinstance(defaults, dict) or not isinstance(saved, dict):
            return saved
        return defaults | {key: over(defaults.get(key), value) for key, value in saved.items()}

    return ml_collections.ConfigDict(over(base.get_config().to_dict(), meta["config"]))


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value}, tuples as the lists that JSON makes of them."""
    found = {}
    for key, value in tree.items():
        value = list(value) if isinstance(value, tuple) else value
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def claim(workdir: Path, meta: dict[str, Any]) -> None:
    """Makes `workdir` this run's, or checks that it already is.

    Raises:
      UserError: it holds another run, or files that no run.json explains; nothing is written then.
    """
    path = workdir / "run.json"
    if path.exists():
        saved = json.loads(path.read_text())
        if "imported_from" in saved:
            raise UserError(f"{workdir} holds weights imported from {saved['imported_from']}, no run; name another --workdir")
        _check_same(workdir, saved, meta)
        return
    for name in ("checkpoints", "metrics.jsonl"):
        if (workdir / name).exists():
            raise UserError(f"{workdir} holds {name} but no run.json; name another --workdir")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(meta, indent=1) + "\n")
            os.replace(partial, path)
        except OSError as e:
            raise UserError(f"cannot write to --workdir={workdir}: {e.strerror}") from e


def _check_same(workdir: Path, saved: dict[str, Any], meta: dict[str, Any]) -> None:
    old, new = flat(config_of(saved).to_dict()), flat(meta["config"])
    may_change = _MAY_CHANGE
    if meta["config"]["optim"]["schedule"] == "constant":
        # Only the cosine looks at where the run ends.
        may_change += ("training.num_steps",)
    different = [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == m or key.startswith(m + ".") for m in may_change)
    ]
    if saved["data_fingerprint"] != meta["data_fingerprint"]:
        different.append("the data are not the same")
    if (saved.get("latents") or {}).get("weights") != (meta.get("latents") or {}).get("weights"):
        different.append("the autoencoder is not the same")
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{workdir} holds another run ({'; '.join(different[:3])}{more}); use its settings to go on, or another --workdir"
        )
