"""Optional Weights & Biases writer: the same as TensorBoard, plus the config. It never stops a run."""

import importlib.util
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from speedit_jax.errors import UserError
from speedit_jax.storage import Mirror, first_line


class WandbBoard:
    """One W&B run for one workdir, whose `wandb_id` it keeps, so that a resumed run continues there.

    Steps that a killed run repeats are logged again, the same. The first failure is one line; after it nothing is logged.
    """

    def __init__(self, workdir: Path, project: str, config: dict[str, Any]):
        self._run = None
        self._attempt(lambda: self._start(workdir, project, config))

    def _start(self, workdir: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        path = workdir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=project,
            id=path.read_text().strip(),
            resume="allow",
            name=workdir.name,
            dir=Mirror(workdir).directory,
            config=config,
            # Not the console, whose progress bar is of no use there; and no reports in ours.
            settings=wandb.Settings(console="off", silent=True),
        )
        # The axis of all charts. W&B's own counts calls and would refuse steps that are repeated.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as e:
            self._run = None
            tqdm.write(f"warning: W&B: {first_line(e)}; training continues without it", file=sys.stderr)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._run:
            self._attempt(lambda: self._run.log({"step": step, **values}))

    def image(self, step: int, path: Path) -> None:
        """The picture in a PNG file."""
        if self._run:
            import wandb

            self._attempt(lambda: self._run.log({"step": step, "samples": wandb.Image(str(path))}))

    def close(self) -> None:
        if self._run:
            self._attempt(lambda: self._run.finish())


def check(project: str) -> None:
    """Raises a UserError where W&B is asked for and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"training.wandb_project={project} needs the package wandb; pip install -e '.[wandb]', or leave it empty")


def open_board(workdir: Path, project: str, config: dict[str, Any]) -> WandbBoard | None:
    """The board of this run, on process 0; None where none is asked for."""
    return WandbBoard(workdir, project, config) if project and jax.process_index() == 0 else None
