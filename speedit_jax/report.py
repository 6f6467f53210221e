"""Makes one page of a run, finished or not: curves, grids, results, settings and where it ran.

  python -m speedit_jax.report --workdir=runs/digits [--out=report.html]

The page is a single file that loads nothing. Training writes it too, when it ends or is interrupted.
"""

import jax
from absl import flags

from speedit_jax import cli, storage
from speedit_jax.errors import UserError
from speedit_jax.reporting.page import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_OUT = flags.DEFINE_string("out", None, "Where to write. Default: WORKDIR/report.html.")


def report() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the directory of a training run")
    # The accelerator is the training's, which may go on meanwhile.
    jax.config.update("jax_platforms", "cpu")
    workdir = storage.path(_WORKDIR.value)
    out = storage.path(_OUT.value) if _OUT.value else None
    if out:
        storage.check_writable(out)
    try:
        path = write_report(workdir, out)
    except OSError as e:
        raise UserError(f"cannot write to {out or workdir}: {storage.reason(e)}; choose another --out") from e
    print(f"{path} ({storage.size(path) / 1e6:.1f} MB); open it in a browser")


if __name__ == "__main__":
    cli.run(report)
