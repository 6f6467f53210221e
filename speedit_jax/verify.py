"""Checks that the files of a run hold what was saved.

  python -m speedit_jax.verify --workdir=runs/digits [--out=verified.json]

Says one line of each checkpoint, of run.json and of metrics.jsonl, and exits with 1 if one is damaged. Changes nothing.
"""

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags

from speedit_jax import cli, storage
from speedit_jax.errors import UserError
from speedit_jax.training import integrity, run, set_aside

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run, or of imported weights.")
_OUT = flags.DEFINE_string("out", None, "Where to write the findings, JSON.")

WHOLE, DAMAGED, UNKNOWN, REMOVED = "whole", "damaged", "unknown", "removed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one part of a run: its path in the workdir, one of WHOLE, DAMAGED, UNKNOWN and REMOVED, and more in words."""

    part: str
    state: str
    detail: str


def check_checkpoint(workdir: Path, name: str) -> Finding:
    part = f"checkpoints/{name}"
    if name.startswith(set_aside.PREFIX):
        return Finding(part, UNKNOWN, "was set aside, damaged; remove it to free its space")
    directory = workdir / "checkpoints" / name
    try:
        state, detail = check_files(directory)
    except FileNotFoundError as e:
        state, detail = DAMAGED, storage.first_line(e)
    if state != WHOLE and not directory.is_dir():
        state, detail = REMOVED, "by the run that goes on there"
    return Finding(part, state, detail)


def check_files(checkpoint: Path) -> tuple[str, str]:
    """(state, detail) of a checkpoint's."""
    if problem := integrity.damage(checkpoint):
        return DAMAGED, problem
    checksums = integrity.read(checkpoint)
    if not checksums:
        return UNKNOWN, "was saved without checksums, by an earlier version"
    megabytes = sum(storage.size(checkpoint / file) for file in checksums) / 1e6
    return WHOLE, f"{len(checksums)} files, {megabytes:.1f} MB"


def check_run(workdir: Path) -> Finding:
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
    """None where nothing was logged yet."""
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


def verify() -> int:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the directory of a training run")
    # The accelerator is the training's, which may go on meanwhile.
    jax.config.update("jax_platforms", "cpu")
    workdir = storage.path(_WORKDIR.value)
    out = storage.path(_OUT.value) if _OUT.value else None
    if out:
        storage.check_writable(out)
    names = [str(step) for step in sorted(integrity.steps(workdir))]
    names += sorted(path.name for path in (workdir / "checkpoints").glob(f"{set_aside.PREFIX}*"))
    if not names and not (workdir / run.NAME).exists():
        raise UserError(f"{workdir} holds no run (no {run.NAME}, no checkpoints); name the --workdir of a training run")
    findings = []
    for check in (*((check_checkpoint, name) for name in names), (check_run,), (check_metrics,)):
        if found := check[0](workdir, *check[1:]):
            findings.append(found)
            print(f"{found.part:<24} {found.state:<8} {found.detail}".rstrip(), flush=True)
    damaged = sum(found.state == DAMAGED for found in findings)
    if out:
        record = {"workdir": str(workdir), "damaged": damaged, "findings": [dataclasses.asdict(found) for found in findings]}
        storage.write_new(out, lambda partial: storage.write_json(partial, record))
    return 1 if damaged else 0


if __name__ == "__main__":
    cli.run(verify)
