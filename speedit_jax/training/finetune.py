"""Starting from the weights of another run, or from imported ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.config import flatten
from speedit_jax.errors import UserError
from speedit_jax.training import changes
from speedit_jax.training.assembly import Assembly
from speedit_jax.training.run import Run, open_run
from speedit_jax.training.state import TrainState

KeyPath = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it

_SHOWN = 3  # names of parameters in one message

# What no array shows: the same weights would mean something else.
_MEANING = (
    "model.time_freq_shift",
    "model.position_scale",
    "model.rope",
    "diffusion.path",
    "diffusion.num_steps",
    "diffusion.noise_scale",
)
_MEANING_OF_SPRINT = ("tokens.start", "tokens.tail")
_MEANING_OF_VP = ("diffusion.prediction", "diffusion.schedule", "diffusion.beta_start", "diffusion.beta_end")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a table: row `new[i]` is to be row `old[i]` of `table`."""

    table: jax.Array
    old: np.ndarray
    new: np.ndarray


def starting_weights(
    where: str, parts: Assembly, class_names: Sequence[str], with_changes: bool = False
) -> tuple[dict[KeyPath, jax.Array | Rows], list[str]]:
    """The newest EMA weights of the run in `where`, for a run of `parts`.

    Position tables are computed, so another resolution fits as it is. Rows of the label table are taken over by the names of the
    classes, and the null label's row; the others start anew. A run on text may start from one without: what its text needs starts
    anew, with attention to it that adds nothing at first. So may a run with data.mask, whose layer for what is known adds nothing
    at first; a run without it may start from one with it, and leaves this layer out. So may a run with tokens.method=sprint,
    whose fusion is at first the middle blocks' result; but what was trained with it needs it.

    Args:
      where: a workdir of train or convert.
      parts: of the run that is to start.
      class_names: of its data.
      with_changes: take weights that were trained for another noise schedule, prediction, timestep embedding or autoencoder.

    Returns:
      {path in the tree of parameters: array, or some of its rows}, without what is to start anew; and lines for the user.

    Raises:
      UserError: there are no weights, or they are of another network.
    """
    try:
        run = open_run(where, mesh=parts.mesh)
        saved = run.restore()
    except UserError as e:
        raise UserError(f"init_from={where}: {e}") from e

    shape = run.meta["image_shape"]
    lines = [f"{run.config.model.name} of {shape[0]} x {shape[1]}, EMA of step {run.step} in {where}"]
    saved, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (saved, parts.shapes.params))
    table = {path: leaf for path, leaf in saved.items() if path[0].key == "label"}
    dropped = [path for path in saved if _is_of_masks(path)] if run.model.hinted and not parts.model.hinted else []
    taken = {path: leaf for path, leaf in saved.items() if path not in table and path not in dropped}
    fresh = [path for path in wanted if _is_of_text(path)] if parts.model.text and not run.model.text else []
    added = [path for path in wanted if _is_of_masks(path)] if parts.model.hinted and not run.model.hinted else []
    fusion = [path for path in wanted if _is_of_sprint(path)] if run.model.path_drop is None else []
    if run.model.path_drop is not None and parts.model.path_drop is None:
        raise UserError(
            f"init_from={where} was trained with tokens.method=sprint, whose fusion this run lacks: set"
            " --config.tokens.method=sprint, and --config.tokens.rate=0 to train with all tokens in all blocks"
        )
    anew = (*fresh, *added, *fusion)
    _check_arrays(where, taken, {p: leaf for p, leaf in wanted.items() if p[0].key != "label" and p not in anew})
    different = _differences(run, parts)
    if different and not with_changes:
        settings = " ".join(f"--config.{key}={old}" for key, (old, _) in different.items() if "." in key)
        said = f"set {settings}" if settings else f"encode with the same {'VAE' if 'latents' in different else 'text encoder'}"
        raise UserError(
            f"init_from={where} was trained with other settings ({changes.spelled(different)}): {said}, or give"
            " --continue_with_changes to use these weights anyway"
        )
    if different:
        lines.append(f"trained with other settings: {changes.spelled(different, len(different))}")
    old, new = label_rows(run, class_names, parts.model.null_label)
    if fresh:
        modules = sorted({"/".join(key.key for key in path[:-1]) for path in fresh})
        lines.append(f"text: {', '.join(modules)} start anew{', without the label table' if table else ''}")
    elif parts.model.num_classes or run.model.num_classes:
        lines.append(_kept(run, class_names, new, parts.model.null_label))
    if added:
        lines.append("masks: the layer hint starts anew, from zero: at first the network is the one before")
    if fusion:
        lines.append("sprint: mask token and fusion start anew: with all tokens the network is at first the one before")
    if dropped:
        lines.append("masks: the layer hint is left out: this run is told nothing of its images (data.mask)")
    taken |= {path: Rows(leaf, old, new) for path, leaf in table.items() if path in wanted}
    return taken, lines


def start_from(state: TrainState, weights: dict[KeyPath, jax.Array | Rows]) -> TrainState:
    """`state` with these parameters, raw and averaged."""

    def one(path, fresh):
        given = weights.get(path, fresh)
        if isinstance(given, Rows):
            put = jax.jit(lambda fresh, table: fresh.at[given.new].set(table[given.old]), out_shardings=fresh.sharding)
            return put(fresh, given.table)
        return given

    params = jax.tree_util.tree_map_with_path(one, state.params)
    # The copies keep params and averages from sharing a buffer, which donation would free twice.
    ema, *extra = (jax.tree.map(jnp.copy, params) for _ in range(1 + len(state.extra_ema)))
    return dataclasses.replace(state, params=params, ema=ema, extra_ema=dict(zip(state.extra_ema, extra, strict=True)))


def _is_of_text(path: KeyPath) -> bool:
    """Whether only a model with text has this parameter."""
    return path[0].key == "text" or any(key.key == "cross" for key in path)


def _is_of_masks(path: KeyPath) -> bool:
    """Whether only a model that is told what is known has this parameter."""
    return path[0].key == "hint"


def _is_of_sprint(path: KeyPath) -> bool:
    """Whether only a model with tokens.method=sprint has this parameter."""
    return path[0].key == "sprint"


def label_rows(run: Run, class_names: Sequence[str], null_label: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the run's label table, rows of the new one that they become)."""
    known = class_names if _by_number(run, class_names) else run.class_names
    numbers = {name: number for number, name in enumerate(known)}
    pairs = [(numbers[name], number) for number, name in enumerate(class_names) if name in numbers]
    if run.model.null_label is not None and null_label is not None:
        pairs.append((run.model.null_label, null_label))
    old, new = np.array(pairs, int).reshape(-1, 2).T
    return old, new


def _by_number(run: Run, class_names: Sequence[str]) -> bool:
    """Whether classes are matched by number, because imported weights may not say what they are.

    Those have their numbers for names. So may the data's have, in another order: that of text, as directories are.
    """
    numbers = [str(i) for i in range(len(class_names))]
    return "imported_from" in run.meta and list(run.class_names) == numbers and set(class_names) != set(numbers)


def _kept(run: Run, class_names: Sequence[str], new: np.ndarray, null_label: int | None) -> str:
    """What becomes of the label table, in a line."""
    before, after, kept = len(run.class_names), len(class_names), int((new < len(class_names)).sum())
    how = "number, since the weights do not name them" if _by_number(run, class_names) and kept else "name"
    said = [f"classes {before} -> {after}: {kept} rows of the label table are kept, by {how}"]
    said += [f"{after - kept} start from random values"] if after > kept else []
    said += [f"{before - kept} are dropped"] if before > kept else []
    if null_label is not None and len(new) == kept:
        said.append("the null label's row starts from random values")
    return ", ".join(said)


def _differences(run: Run, parts: Assembly) -> dict[str, list[Any]]:
    """{key: [its value in the run, in the new one]} of what the weights mean."""
    old, new = (flatten(config.to_dict()) for config in (run.config, parts.config))
    keys = _MEANING + (_MEANING_OF_VP if {old["diffusion.path"], new["diffusion.path"]} == {"vp"} else ())
    if old["diffusion.num_steps"] == new["diffusion.num_steps"] and _same_noise(run, parts):
        keys = tuple(key for key in keys if not key.startswith(("diffusion.schedule", "diffusion.beta")))
    keys += _MEANING_OF_SPRINT if old["tokens.method"] == new["tokens.method"] == "sprint" else ()
    found = {key: [old[key], new[key]] for key in keys if old.get(key) != new.get(key)}
    if "vp" not in (old["diffusion.path"], new["diffusion.path"]):
        predictions = [of["diffusion.prediction"] for of in (old, new)]
        if predictions.count("x0") == 1:  # the others are the velocity
            found["diffusion.prediction"] = predictions
    # Of imported weights it may not be known whose latents they draw.
    if run.encoded_by and not changes.same_latents(run.encoded_by, parts.encoded_by):
        found["latents"] = [run.encoded_by["vae"], (parts.encoded_by or {}).get("vae", "none")]
    if run.text_encoder and parts.texts and not changes.same_encoder(run.text_encoder, parts.texts.identity):
        found["text"] = [run.text_encoder["encoder"], parts.texts.identity["encoder"]]
    return found


def _same_noise(run: Run, parts: Assembly) -> bool:
    """Whether a schedule goes by two names."""
    return np.array_equal(run.diffusion.schedule.betas, parts.diffusion.schedule.betas)


def _check_arrays(where: str, saved: dict[KeyPath, Any], wanted: dict[KeyPath, Any]) -> None:
    """Raises a UserError that names what differs."""

    def name(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    problems = [f"{name(path)} does not exist in this model" for path in saved if path not in wanted]
    problems += [
        f"{name(path)} has shape {saved[path].shape}, not {wanted[path].shape}"
        for path in saved
        if path in wanted and saved[path].shape != wanted[path].shape
    ]
    problems += [f"{name(path)} is missing" for path in wanted if path not in saved]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"init_from={where} does not match this model: {'; '.join(sorted(problems)[:_SHOWN])}{more}")
