"""Starting from the weights of another run, or from imported ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from speedit_jax.errors import UserError
from speedit_jax.training.assembly import Assembly
from speedit_jax.training.run import open_run
from speedit_jax.training.state import TrainState

KeyPath = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it

_SHOWN = 3  # names of parameters in one message


def starting_weights(where: str, parts: Assembly) -> tuple[dict[KeyPath, jax.Array], list[str]]:
    """The newest EMA weights of the run in `where`, for a run of `parts`.

    Position tables are computed, so another resolution fits as it is; the label table is taken over only where the classes are
    the same in number, since its rows mean nothing to others.

    Args:
      where: a workdir of train or convert.
      parts: of the run that is to start.

    Returns:
      {path in the tree of parameters: array}, without what is to start anew; and lines for the user.

    Raises:
      UserError: there are no weights, or they are of another network.
    """
    try:
        run = open_run(where, mesh=parts.mesh)
        saved = run.restore()
    except UserError as e:
        raise UserError(f"init_from={where}: {e}") from e

    model, prediction = parts.model, parts.diffusion.prediction
    saved_model, shape = run.model, run.meta["image_shape"]
    if run.diffusion.prediction != prediction:
        raise UserError(f"init_from={where} predicts {run.diffusion.prediction}, not {prediction} (diffusion.prediction)")
    lines = [f"{run.config.model.name} of {shape[0]} x {shape[1]}, EMA of step {run.step} in {where}"]
    keep_labels = saved_model.num_classes == model.num_classes and saved_model.null_label == model.null_label
    if not keep_labels:
        lines.append(f"classes {saved_model.num_classes} -> {model.num_classes}: the label table starts anew")
    saved, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (saved, parts.shapes.params))
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
