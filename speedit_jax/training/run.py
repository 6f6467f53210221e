"""A run: its identity, which keeps other runs from being continued or overwritten by mistake, and the door to what it learned."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from speedit_jax import __version__, sharding, storage
from speedit_jax.config import complete, flatten
from speedit_jax.data.sources import Source
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.training.assembly import make_diffusion, make_model
from speedit_jax.training.checkpoint import Checkpoints

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
            storage.write_json(path, meta)
        except OSError as e:
            raise UserError(f"cannot write to --workdir={workdir}: {e.strerror}") from e


def _check_same(workdir: Path, saved: dict[str, Any], meta: dict[str, Any]) -> None:
    old, new = flatten(complete(saved["config"]).to_dict()), flatten(meta["config"])
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
    def latents(self) -> dict[str, Any] | None:
        """The identity of the autoencoder whose latents the model draws; None where it draws images."""
        return self.meta.get("latents")

    @property
    def draws_latents(self) -> bool:
        """Whether the model draws latents, of a known autoencoder or not: images have one or three channels."""
        return self.latents is not None or self.model.image_shape[2] not in (1, 3)

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
    workdir = Path(workdir).expanduser()
    checkpoints = Checkpoints(workdir)
    step = checkpoints.choose(step)
    meta = checkpoints.meta(step)
    config = complete(meta["config"])
    config.model.dtype = dtype or config.model.dtype
    mesh = mesh or sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    model = make_model(config, mesh, meta["image_shape"], len(meta["class_names"]))
    return Run(workdir, step, meta, config, mesh, make_diffusion(config), model, checkpoints)
