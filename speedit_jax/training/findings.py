"""What is found where the files of a run are looked at: whole, damaged, or neither."""

import dataclasses
import json
from pathlib import Path

from speedit_jax import storage
from speedit_jax.training import integrity, run, set_aside

WHOLE, DAMAGED, UNKNOWN, REMOVED = "whole", "damaged", "unknown", "removed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one part of a run: its path in the workdir, one of WHOLE, DAMAGED, UNKNOWN and REMOVED, and more in words."""

    part: str
    state: str
    detail: str


def check_checkpoint(workdir: Path, name: str) -> Finding:
    """Of a directory in WORKDIR/checkpoints; a trainer that goes on may remove it meanwhile.

    Raises:
      UserError: this user may not read a file of it.
    """
    part = f"checkpoints/{name}"
    if name.startswith(set_aside.PREFIX):
        return Finding(part, UNKNOWN, "was set aside, damaged; remove it to free its space")
    directory = workdir / "checkpoints" / name
    try:
        state, detail = check_files(directory)
    except FileNotFoundError as e:
        state, detail = DAMAGED, storage.first_line(e)
    # In an object store the files go one after another, the one that makes it a checkpoint first.
    if state != WHOLE and int(name) not in integrity.steps(workdir):
        state, detail = REMOVED, "by the run that goes on there"
    return Finding(part, state, detail)


def check_files(checkpoint: Path) -> tuple[str, str]:
    """(state, detail) of what lies in the directory `checkpoint`."""
    if problem := integrity.damage(checkpoint):
        return DAMAGED, problem
    checksums = integrity.read(checkpoint)
    if not checksums:
        return UNKNOWN, "was saved without checksums, by an earlier version"
    megabytes = sum(storage.size(checkpoint / file) for file in checksums) / 1e6
    return WHOLE, f"{len(checksums)} files, {megabytes:.1f} MB"


def check_run(workdir: Path) -> Finding:
    """Of run.json; raises a UserError if this user may not read it."""
    path = workdir / run.NAME
    try:
        run.read_run(path)
    except FileNotFoundError:
        return Finding(run.NAME, DAMAGED, "is missing; train writes it again from a checkpoint")
    except PermissionError as e:
        raise storage.forbidden(path, e) from e
    except (OSError, ValueError):
        return Finding(run.NAME, DAMAGED, "does not hold what was written; train writes it again from a checkpoint")
    return Finding(run.NAME, WHOLE, "")


def check_metrics(workdir: Path) -> Finding | None:
    """Of metrics.jsonl; None where nothing was logged yet."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    bad, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            bad.append(str(number))
    if bad:
        return Finding(path.name, DAMAGED, f"{len(bad)} of {len(lines)} lines cannot be read: {', '.join(bad[:5])}")
    return Finding(path.name, WHOLE, f"{len(lines)} lines")
