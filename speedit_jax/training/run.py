"""A run: its identity, so that no other run is resumed or overwritten by mistake, and open_run, which restores its weights."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from speedit_jax import __version__, sharding, storage
from speedit_jax.config import complete, flatten
from speedit_jax.data.sources import Source
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.models.condition import TextShape
from speedit_jax.training import changes
from speedit_jax.training.assembly import make_diffusion, make_model
from speedit_jax.training.checkpoint import Checkpoints, peek

NAME = "run.json"
# Key of `model` -> kernels of an accelerator. Where one is, auto takes its own; the weights do not depend on them.
_KERNELS = {"attention": ("cudnn", "pallas"), "gla": ("pallas_tpu", "pallas_gpu")}
_CHECKSUM = "checksum"  # of all the rest of run.json
# What of a config all processes of a run must have alike: also when to save and to stop, which they do together.
_OF_ALL_HOSTS = (changes.Kind.ROUNDING, changes.Kind.CHANGES, changes.Kind.FORM, changes.Kind.FREE)
_OF_EACH_HOST = ("data.threads", *(f"evaluation.{path}" for path in ("inception", "reference", "loss_source", "loss_text")))


def describe(
    config: ml_collections.ConfigDict, source: Source, image_shape: tuple[int, int, int], encoded_by: dict[str, Any] | None
) -> dict[str, Any]:
    """The JSON that a run's directory and each of its checkpoints carry: enough to sample without the config file.

    Args:
      image_shape: of what the model draws.
      encoded_by: the identity of the autoencoder whose latents the model draws; None where it draws images.
    """
    texts, features = (getattr(source, name, None) for name in ("texts", "features"))
    of_features = {"features": {"encoder": features.identity, "shape": list(features.shape)}} if features else {}
    return of_features | {
        # JSON knows no tuples: a run compares with what it reads back.
        "config": json.loads(json.dumps(config.to_dict())),
        "image_shape": list(image_shape),
        "latents": encoded_by,
        "text": texts and {"encoder": texts.identity, "width": texts.width, "length": texts.length},
        "class_names": list(source.class_names),
        "data_fingerprint": source.fingerprint,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__},
    }


def check_hosts(meta: dict[str, Any]) -> None:
    """Compares what the processes of a run are about to train on, and how; all must call it.

    Each loads its rows of a batch by itself, so that other data, or another seed, would not be noticed.

    Args:
      meta: of this process, as `describe` makes it.

    Raises:
      UserError: to all of them, where one differs from the first.
    """
    if jax.process_count() == 1:
        return
    parts = {
        "data": [meta[key] for key in ("data_fingerprint", "class_names", "image_shape")],
        "settings": [
            (key, value)
            for key, value in flatten(meta["config"]).items()
            if changes.kind_of(key) in _OF_ALL_HOSTS and key not in _OF_EACH_HOST
        ],
    }
    digests = [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest() for part in parts.values()]
    found = multihost_utils.process_allgather(np.stack([np.frombuffer(digest, np.uint8) for digest in digests]))
    for name, of_all in zip(parts, found.swapaxes(0, 1), strict=True):
        other = np.flatnonzero((of_all != of_all[0]).any(axis=1))
        if len(other):
            raise UserError(
                f"process {other[0]} of {len(of_all)} has other {name} than process 0; start the same command on all hosts, on"
                " equal copies of the data"
            )


def settle(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Replaces "auto" by what the run in `workdir` has, where it stands for what depends on the run's age."""
    saved, _ = _read(workdir)
    if saved and config.optim.decay_mask == "auto":
        config.optim.decay_mask = complete(saved["config"]).optim.decay_mask


def claim(
    workdir: Path,
    meta: dict[str, Any],
    *,
    step: int = 0,
    older_fingerprints: Iterable[str] = (),
    with_changes: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Makes `workdir` this run's, or checks that it already is.

    Args:
      meta: of this run, as `describe` makes it.
      step: of the newest checkpoint; 0 where there is none.
      older_fingerprints: what earlier versions called the data.
      with_changes: the run may go on with settings and data that make it another one.

    Returns:
      `meta` with what the run has changed so far under "changes", a list of {"step": n, NAME: [old, new], ...}; and lines for
      the user. `record` writes changes down, when the state is known to fit.

    Raises:
      UserError: it holds another run, or files that no run.json explains; nothing is written then.
    """
    saved, whole = _read(workdir)
    if saved:
        if "imported_from" in saved:
            raise UserError(
                f"{workdir} holds weights imported from {saved['imported_from']}, not a training run; choose another"
                f" --workdir, and fine-tune with --config.init_from={workdir}"
            )
        meta, lines = _go_on(workdir, saved, meta, step, older_fingerprints, with_changes)
        if not whole:
            lines.insert(0, f"{NAME} was missing or damaged; it is written again from the newest checkpoint")
    else:
        for name in ("checkpoints", "metrics.jsonl"):
            if (workdir / name).exists():
                raise UserError(f"{workdir} holds {name} but no run.json; choose another --workdir")
        lines = []
    if jax.process_count() > 1:
        # Another process would take for damaged what appears while it looks.
        multihost_utils.sync_global_devices("run.json is read")
    if not whole:
        _write(workdir, saved or meta)
    return meta, lines


def record(workdir: Path, meta: dict[str, Any]) -> None:
    """Writes down changes that are new since `claim`: a later start is compared with these settings."""
    saved, _ = _read(workdir)
    if saved.get("changes", []) != meta.get("changes", []):
        _write(workdir, meta)


def _read(workdir: Path) -> tuple[dict[str, Any] | None, bool]:
    """(what run.json says, True); (a checkpoint's copy, False) where it is missing or damaged; (None, False) without either.

    Raises:
      UserError: it is damaged, and there is no checkpoint; or this user may not read it.
    """
    path = workdir / NAME
    try:
        return read_run(path), True
    except PermissionError as e:
        raise storage.forbidden(path, e) from e
    except (OSError, ValueError):
        pass  # a checkpoint has a copy
    if newest := peek(workdir):
        return {key: value for key, value in newest[1].items() if key != "evaluation"}, False
    if path.exists():
        raise UserError(f"{path} is damaged, and no checkpoint holds a copy; name another --workdir")
    return None, False


def read_run(path: Path) -> dict[str, Any]:
    """What a run.json says.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged.
    """
    meta = json.loads(path.read_text())
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds no JSON object")
    checksum = meta.pop(_CHECKSUM, None)  # earlier versions wrote none
    if checksum not in (None, _checksum(meta)):
        raise ValueError(f"{path} does not hold what was written")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write(workdir: Path, meta: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        try:
            storage.make_directory(workdir)
            storage.write_json(workdir / NAME, meta | {_CHECKSUM: _checksum(meta)})
        except OSError as e:
            raise UserError(f"cannot write to --workdir={workdir}: {storage.reason(e)}") from e


def _go_on(workdir, saved, meta, step, older_fingerprints, with_changes) -> tuple[dict[str, Any], list[str]]:
    found = changes.compare(saved, meta, older_fingerprints, started=step > 0)
    anew = f"start a new run from its weights with --config.init_from={workdir} and another --workdir"
    if found.misfits:
        way = f"its state does not fit these; {anew}"
        if any(changes.is_of_the_network(key) for key in found.misfits):
            way = "another network starts in another --workdir (init_from takes weights of the same network only)"
        said = changes.spelled(found.misfits | found.changes)
        raise UserError(f"{workdir} was made with other settings ({said}); use its settings to resume; {way}")
    if found.changes and not with_changes:
        raise UserError(
            f"{workdir} was made with other settings ({changes.spelled(found.changes)}); use its settings to resume, or"
            f" --continue_with_changes to resume from step {step} with these, or {anew}"
        )
    lines = [f"the same to rounding: {changes.spelled(found.rounding)}"] if found.rounding else []
    lines += [f"without effect after the first step: {changes.spelled(found.late)}"] if found.late else []
    earlier = saved.get("changes", [])
    if found.changes:
        lines.append(f"changed from step {step} on: {changes.spelled(found.changes)}")
        earlier = [*earlier, {"step": step, **found.changes}]
    return meta | ({"changes": earlier} if earlier else {}), lines


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run, opened to use its weights.

    Attributes:
      workdir: of the run.
      step: of the checkpoint.
      meta: the JSON that the checkpoint carries, as `describe` makes it.
      config: the whole config; keys younger than the run have their defaults.
      mesh: that weights are restored onto.
      diffusion, model: as in training.
    """

    workdir: Path
    step: int
    meta: dict[str, Any]
    config: ml_collections.ConfigDict
    mesh: Mesh
    diffusion: GaussianDiffusion | FlowMatching
    model: Model
    checkpoints: Checkpoints

    @property
    def class_names(self) -> list[str]:
        return self.meta["class_names"]

    @property
    def encoded_by(self) -> dict[str, Any] | None:
        """The identity of the autoencoder whose latents the model draws; None where it draws images."""
        return self.meta.get("latents")

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """The identity of the text encoder whose captions condition the model; None without text."""
        text = self.meta.get("text")
        return text and text["encoder"]

    @property
    def draws_latents(self) -> bool:
        """Whether the model draws latents, of a known autoencoder or not: images have one or three channels."""
        return self.encoded_by is not None or self.model.image_shape[2] not in (1, 3)

    @functools.cached_property
    def shapes(self) -> Any:
        """Of the parameters."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    def restore(self, weights: str = "ema") -> Any:
        """The parameters on the mesh: "ema", "raw" or "ema_DECAY".

        Raises:
          UserError: the checkpoint is damaged, or has no such weights.
        """
        shardings = sharding.param_shardings(self.mesh, self.model.axes, self.shapes)
        return self.checkpoints.restore_weights(self.step, weights, self.shapes, shardings)


def open_run(workdir: Path | str, step: int | str | None = None, mesh: Mesh | None = None, dtype: str | None = None) -> Run:
    """The checkpoint of a run, or of imported weights.

    Args:
      workdir: its directory.
      step: a number, "newest" (as None) or "best".
      mesh: to restore weights onto; None shares batches among all devices, however the run was sharded.
      dtype: of activations, in place of the config's model.dtype.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    workdir = storage.path(workdir)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.choose(step)
    meta = checkpoints.meta(step)
    config = complete(meta["config"])
    config.model.dtype = dtype or config.model.dtype
    config.model.update({key: "auto" for key, kernels in _KERNELS.items() if config.model[key] in kernels})
    mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    said = meta.get("text")
    text = said and TextShape(said["width"], said["length"], said["encoder"]["pooled"])
    model = make_model(config, mesh, meta["image_shape"], len(meta["class_names"]), text)
    return Run(workdir, step, meta, config, mesh, make_diffusion(config), model, checkpoints)
