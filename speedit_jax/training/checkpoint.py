"""Checkpoints: the only owner of orbax.

A checkpoint is the directory WORKDIR/checkpoints/STEP with two items: `state`, every array of the train state, and
`meta`, JSON with the whole config, the data's fingerprint and class names, the versions that wrote it, and its own
evaluation, if it had one; and checksums of their files. On a disk, orbax writes to a temporary name and renames when all is
there, and renames again what is to go. In an object store, which cannot rename, the file commit_success.txt is written last and
removed first. Either way a checkpoint that is listed is whole; the checksums tell whether it still is.
"""

import contextlib
import dataclasses
import json
import os
import re
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.storage import first_line
from speedit_jax.training import integrity, s3
from speedit_jax.training.state import TrainState

_RAW = "params"
_ITEMS = ("state", "meta")

# Where checkpoints that are not kept wait to be removed: a kill in the midst of that leaves none half there.
_REMOVED = "removed"


def _as_dict(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: the fields, each extra average beside the first as ema_DECAY, and heads where there are any."""
    found = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    extra = found.pop("extra_ema")
    if not state.heads:
        del found["heads"]
    return found | {f"ema_{decay}": ema for decay, ema in extra.items()}


def _from_dict(found: dict[str, Any]) -> TrainState:
    """The inverse."""
    names = {field.name for field in dataclasses.fields(TrainState)}
    extra = {name.removeprefix("ema_"): found[name] for name in found if name not in names}
    return TrainState(**{name: found[name] for name in found if name in names}, extra_ema=extra)


def _flat(tree: Any) -> dict[str, Any]:
    """{"a/b/c": leaf}; orbax's metadata names the fields of optax's states as dictionary keys, and so do we."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _check(saved: Any, wanted: Any, where: str) -> None:
    """Raises a UserError that names what differs between a checkpoint's arrays and those wanted."""
    saved, wanted = _flat(saved), _flat(wanted)
    problems = [f"missing {name}" for name in wanted if name not in saved]
    problems += [f"extra {name}" for name in saved if name not in wanted]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in saved and tuple(saved[name].shape) != tuple(wanted[name].shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}")


def _best(evaluations: dict[int, dict[str, Any]]) -> int | None:
    """The step of the lowest score, the earliest of equals, among those evaluated as the newest was: others do not compare."""
    if not evaluations:
        return None
    how = evaluations[max(evaluations)]["how"]
    return min((of["score"], step) for step, of in evaluations.items() if of["how"] == how)[1]


@dataclasses.dataclass(frozen=True)
class _Best:
    """Preserves the best of the evaluated checkpoints; `evaluations` is read when orbax asks, which is after each save."""

    evaluations: dict[int, dict[str, Any]]

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best({step: self.evaluations[step] for step in steps if step in self.evaluations})
        return [step == best for step in steps]


def check_place(workdir: Path) -> None:
    """Raises a UserError for a directory from which a checkpoint would not be read back.

    Orbax looks for what each process wrote with glob.glob, of the whole path, and leaves it out of the checkpoint where it finds
    nothing; tensorstore writes to a/b instead of a\\b.
    """
    path = storage.absolute(workdir)
    if found := re.search(r"[*?[\\]", os.fspath(path)):
        raise UserError(
            f"--workdir={path}: checkpoints in a path with {found[0]} could not be read back; choose another directory"
        )


class Checkpoints:
    """The checkpoints of one run.

    The best of those that were evaluated is kept, too.

    Args:
      workdir: of the run.
      keep_last: how many of the newest to keep.
      keep_every: also keep every one whose step is a multiple of this; 0 keeps none besides the newest.
      create: make the directory (a run about to train) or require it (a run to be sampled).
    """

    def __init__(self, workdir: Path, *, keep_last: int = 1, keep_every: int = 0, create: bool = False):
        self.directory = storage.absolute(workdir) / "checkpoints"
        if not create and not self.directory.is_dir():
            raise UserError(f"no checkpoints in {workdir}; train there first, or give the directory of another run")
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._saving: int | None = None
        policies = [keep.LatestN(keep_last), _Best(self._evaluations)] + ([keep.EveryNSteps(keep_every)] if keep_every else [])
        self._policy = keep.AnyPreservationPolicy(policies)
        self._remote = storage.is_remote(self.directory)
        if self._remote:
            s3.teach_orbax()
        commits = ocp.options.AtomicityMode.COMMIT_FILE if self._remote else ocp.options.AtomicityMode.AUTO
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # In an object store orbax would remove the files of a checkpoint in any order: `_remove` does it there.
                preservation_policy=keep.PreserveAll() if self._remote else self._policy,
                create=create,
                # What a killed run left half-written would otherwise stay and eat space.
                cleanup_tmp_directories=create,
                todelete_subdir=None if self._remote else _REMOVED,
                atomicity_options=ocp.options.AtomicityOptions(mode=commits),
                # Called by one process, when all have written and before the directory gets its name.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_names=_ITEMS,
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )
        if create:
            self._evaluations |= self._read_evaluations()
            self._remove()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def choose(self, step: int | str | None) -> int:
        """`step`, a number, "newest" (as None) or "best".

        Raises:
          UserError: there is none, or not that one.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"no finished checkpoint in {self.directory} yet; train longer")
        if step in (None, "newest"):
            return steps[-1]
        there = f"there are {', '.join(map(str, steps))}"
        if step == "best":
            if best := self.best():
                return best[0]
            raise UserError(
                f"no checkpoint in {self.directory} was evaluated, so there is no best one (see evaluation.every); {there}"
            )
        if str(step) not in map(str, steps):
            raise UserError(f"no checkpoint of step {step} in {self.directory}; {there}; or give newest or best")
        return int(step)

    def best(self) -> tuple[int, dict[str, float]] | None:
        """(step, numbers) of the best of the evaluated checkpoints; None where none was."""
        evaluations = self._read_evaluations()
        step = _best(evaluations)
        return None if step is None else (step, evaluations[step]["values"])

    def _read_evaluations(self) -> dict[int, dict[str, Any]]:
        found = {step: self.meta(step).get("evaluation") for step in self._manager.all_steps()}
        return {step: evaluation for step, evaluation in found.items() if evaluation}

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing; returns when the arrays are copied and may be donated.

        Raises:
          UserError: this or the previous, asynchronous save could not be written.
        """
        self._save(step, _as_dict(state), meta)

    def save_weights(self, step: int, params: Any, ema: Any, meta: dict[str, Any]) -> None:
        """As `save`, of weights that were trained elsewhere: they can be sampled, not trained on.

        Raises:
          UserError: it could not be written.
        """
        self._save(step, {"step": np.int32(step), "params": params, "ema": ema}, meta)

    def _save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        if evaluation := meta.get("evaluation"):
            self._evaluations[step] = evaluation
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self.wait()
        self._saving = step
        with _named_failure(self.directory):
            self._manager.save(step, args=items)

    def _seal(self) -> None:
        unnamed = self.directory / str(self._saving)
        if not self._remote:
            (unnamed,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        integrity.seal(unnamed, _ITEMS)

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          UserError: it could not be written.
        """
        with _named_failure(self.directory):
            self._manager.wait_until_finished()
        self._remove()

    def _remove(self) -> None:
        """Removes what is not kept."""
        if self._remote:
            steps = sorted(self._manager.all_steps())
            kept = self._policy.should_preserve(
                [types.SimpleNamespace(step=step) for step in steps], context=keep.PreservationContext()
            )
            for step in (step for step, keeps in zip(steps, kept, strict=True) if not keeps):
                if jax.process_index() == 0:
                    storage.remove(self.directory / str(step) / integrity.COMMIT)
                    storage.remove(self.directory / str(step))
                self._manager.delete(step)
        elif jax.process_index() == 0:
            with contextlib.suppress(OSError):
                storage.remove(self.directory / _REMOVED)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step.

        Raises:
          UserError: it is damaged.
        """
        self._refuse(step, integrity.damage_of_meta(self.directory / str(step)))
        with _named_damage(self.directory / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _refuse(self, step: int, problem: str | None) -> None:
        """Raises a UserError if there is a problem with the files of a step."""
        where = self.directory / str(step)
        if problem and not where.is_dir():
            raise UserError(_removed(where))
        if problem:
            raise UserError(
                f"checkpoint {where} is damaged ({problem}); choose another step, or run train: it sets this one aside and"
                " resumes from the newest whole one"
            )

    def restore(self, step: int, shapes: TrainState, shardings: TrainState, verify: bool = True) -> TrainState:
        """The whole state, onto any mesh.

        Args:
          verify: compare the files with their checksums first, which reads them once more.

        Raises:
          UserError: an array is missing, extra or of another shape, or the files are damaged.
        """
        if verify:
            self._refuse(step, integrity.damage(self.directory / str(step)))
        restored = self._restore(step, _as_dict(shapes), _as_dict(shardings), partial=False)
        return _from_dict(restored)

    def restore_weights(self, step: int, weights: str, shapes: Any, shardings: Any) -> Any:
        """Only the parameters: "ema", "raw" or "ema_DECAY". All files are compared with their checksums.

        Raises:
          UserError: as `restore`; or there are no such weights.
        """
        self._refuse(step, integrity.damage(self.directory / str(step)))
        with _named_damage(self.directory / str(step)):
            saved = self._manager.item_metadata(step)["state"].tree
        choices = {"raw": _RAW} | {name: name for name in saved if name.split("_")[0] == "ema"}
        if weights not in choices:
            raise UserError(f"unknown --weights={weights}; this checkpoint has {', '.join(sorted(choices))}")
        key = choices[weights]
        return self._restore(step, {key: shapes}, {key: shardings}, partial=True)[key]

    def _restore(self, step: int, shapes: dict, shardings: dict, partial: bool) -> dict:
        where = self.directory / str(step)
        with _named_damage(where):
            saved = self._manager.item_metadata(step)["state"].tree
        _check({name: saved[name] for name in shapes if name in saved} if partial else saved, shapes, f"checkpoint {where}")
        restore_args = jax.tree.map(
            lambda s, sharding: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=s.shape, dtype=s.dtype),
            shapes,
            shardings,
        )
        item = ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args, partial_restore=partial)
        with _named_damage(where):
            return self._manager.restore(step, args=ocp.args.Composite(state=item))["state"]

    def close(self) -> None:
        """Raises a UserError where what was to be saved could not be."""
        with _named_failure(self.directory):
            self._manager.close()


def peek(workdir: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint's step and the JSON saved with it, by one process alone; None where none can be read.

    A CheckpointManager would wait for the other processes of a run.
    """
    for step in integrity.steps(workdir):
        path = workdir / "checkpoints" / str(step)
        with contextlib.suppress(OSError, ValueError):
            if not integrity.damage_of_meta(path):
                return step, json.loads((path / integrity.META).read_text())
    return None


@contextlib.contextmanager
def _named_failure(directory: Path):
    """Turns what orbax raises on a failed write into one line; what was saved before is untouched, what was not is removed."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        for partial in directory.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
            with contextlib.suppress(OSError):
                storage.remove(partial)
        # What orbax had begun to write is dropped with its coroutines, of which Python would warn after our line.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        text, way = first_line(e), "mend that"
        # Orbax reports a full disk as a ValueError that quotes tensorstore's status.
        if "RESOURCE_EXHAUSTED" in str(e) or "No space left" in str(e):
            text, way = "no space left on the device", "free some disk space"
        raise UserError(
            f"could not write a checkpoint to {directory}: {text}; the earlier checkpoints are intact; {way} and run the same"
            " command again"
        ) from e


def _removed(where: Path) -> str:
    return f"checkpoint {where} was removed by the run that goes on there; run the same command again"


@contextlib.contextmanager
def _named_damage(where: Path):
    """Turns what orbax raises on damaged files into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # Many layers read a checkpoint, each with exceptions of its own.
        if not where.is_dir():
            raise UserError(_removed(where)) from e
        raise UserError(
            f"checkpoint {where} cannot be read ({first_line(e)}); remove that directory to resume from the previous checkpoint"
        ) from e


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    """{"path": array} of everything in a state, for comparisons to the bit."""
    return {name: np.asarray(leaf) for name, leaf in _flat(_as_dict(state)).items()}
