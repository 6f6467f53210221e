"""Starting from the weights of another run, or from imported ones."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.training import builders, run, sharding
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.state import TrainState

KeyPath = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it

_SHOWN = 3  # names of parameters in one message


def starting_weights(
    where: str, model: Model, prediction: str, shapes: Any, mesh: Mesh
) -> tuple[dict[KeyPath, jax.Array], list[str]]:
    """The newest EMA weights of the run in `where`, for `model`.

    Position tables are computed, so another resolution fits as it is; the label table is taken over only where the classes are
    the same in number, since its rows mean nothing to others.

    Args:
      where: a workdir of train or convert.
      model, prediction: of the run that is to start.
      shapes: of its parameters.

    Returns:
      {path in the tree of parameters: array}, without what is to start anew; and lines for the user.

    Raises:
      UserError: there are no weights, or they are of another network.
    """
    try:
        checkpoints = Checkpoints(Path(where).expanduser())
        step = checkpoints.choose(None)
        meta = checkpoints.meta(step)
        config = run.config_of(meta)
        saved_prediction = builders.make_diffusion(config).prediction
        saved_model = builders.make_model(config, mesh, meta["image_shape"], len(meta["class_names"]))
        saved_shapes = jax.eval_shape(saved_model.init, jax.random.key(0))
        shardings = sharding.param_shardings(mesh, saved_model.axes, saved_shapes)
        saved = checkpoints.restore_weights(step, "ema", saved_shapes, shardings)
    except UserError as e:
        raise UserError(f"init_from={where}: {e}") from e

    if saved_prediction != prediction:
        raise UserError(f"init_from={where} predicts {saved_prediction}, not {prediction} (diffusion.prediction)")
    lines = [f"{config.model.name} of {meta['image_shape'][0]} x {meta['image_shape'][1]}, EMA of step {step} in {where}"]
    keep_labels = saved_model.num_classes == model.num_classes and saved_model.null_label == model.null_label
    if not keep_labels:
        lines.append(f"classes {saved_model.num_classes} -> {model.num_classes}: the label table starts anew")
    saved, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (saved, shapes))
    names = {path: jax.tree_util.keystr(path, simple=True, separator="/") for path in saved.keys() | wanted.keys()}
    taken = {path: array for path, array in saved.items() if keep_labels or not names[path].startswith("label/")}
    problems = [f"{names[path]} is not in this run's" for path in taken if path not in wanted]
    problems += [
        f"{names[path]} has shape {saved[path].shape}, not {wanted[path].shape}"
        for path in taken
        if path in wanted and saved[path].shape != wanted[path].shape
    ]
    problems += [f"{names[path]} is missing" for path in wanted if path not in taken and not names[path].startswith("label/")]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"init_from={where} holds another network: {'; '.join(sorted(problems)[:_SHOWN])}{more}")
    return taken, lines


def start_from(state: TrainState, weights: dict[KeyPath, jax.Array]) -> TrainState:
    """`state` with these parameters, raw and averaged."""
    params = jax.tree_util.tree_map_with_path(lambda path, fresh: weights.get(path, fresh), state.params)
    # The copies keep params and averages from sharing a buffer, which donation would free twice.
    ema, *extra = (jax.tree.map(jnp.copy, params) for _ in range(1 + len(state.extra_ema)))
    return dataclasses.replace(state, params=params, ema=ema, extra_ema=dict(zip(state.extra_ema, extra, strict=True)))
