"""Damaged checkpoints are put where nobody takes them for whole, and a run goes on from the newest that is."""

import itertools
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.training import integrity

PREFIX = "damaged-"


def set_aside_damaged(workdir: Path, strict: bool = False) -> list[str]:
    """Renames each checkpoint of WORKDIR/checkpoints that is newer than the newest whole one to damaged-STEP.

    An older one is looked at as far as a run that goes on reads it, which is its JSON. All processes must call it.

    Args:
      strict: raise instead.

    Returns:
      Lines for the user.

    Raises:
      UserError: no checkpoint is whole, `strict`, or a directory cannot be renamed; nothing is renamed then.
    """
    directory = workdir / "checkpoints"
    damaged, whole = {}, False
    for step in integrity.steps(workdir):
        look = integrity.damage_of_meta if whole else integrity.damage
        if problem := look(directory / str(step)):
            damaged[step] = problem
        else:
            whole = True
    told = [f"checkpoint {directory / str(step)} is damaged ({problem})" for step, problem in damaged.items()]
    if damaged and strict:
        raise UserError(f"{told[0]}; without --strict the run sets it aside and resumes from the newest whole one")
    if damaged and not whole:
        raise UserError(f"{told[0]}, and no checkpoint in {directory} is whole; start again in another --workdir")
    lines = []
    for step, line in zip(damaged, told, strict=True):
        to = _free(directory, step)
        lines.append(f"{line}: set aside as {to.name}")
        if jax.process_index() == 0:
            try:
                storage.move_directory(directory / str(step), to, integrity.COMMIT)
            except OSError as e:
                raise UserError(f"{line} and cannot be renamed: {storage.reason(e)}") from e
    if damaged and jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    return lines


def _free(directory: Path, step: int) -> Path:
    """A name that no directory has: the same step can be damaged again."""
    names = itertools.chain([f"{PREFIX}{step}"], (f"{PREFIX}{step}-{n}" for n in itertools.count(2)))
    return next(path for path in map(directory.joinpath, names) if not path.exists())
