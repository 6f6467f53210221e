"""Checks that the files of a run hold what was saved.

  python -m speedit_jax.verify --workdir=runs/digits [--out=verified.json]

Says one line of each checkpoint, of run.json and of metrics.jsonl, and exits with 1 if one is damaged. Changes nothing.
"""

import dataclasses

import jax
from absl import flags

from speedit_jax import cli, storage
from speedit_jax.errors import UserError
from speedit_jax.training import integrity, run, set_aside
from speedit_jax.training.findings import DAMAGED, check_checkpoint, check_metrics, check_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run, or of imported weights.")
_OUT = flags.DEFINE_string("out", None, "Where to write the findings, JSON.")


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
