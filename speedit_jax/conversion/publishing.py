"""A run as a repository on the Hugging Face hub: its weights, its settings, its numbers and a model card."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from speedit_jax import storage
from speedit_jax.conversion import card, measured, public
from speedit_jax.conversion.exporting import file_state, gather, refuse_infinite, unpublished
from speedit_jax.conversion.tables import one_device
from speedit_jax.errors import UserError
from speedit_jax.interop import files, model_hub, own
from speedit_jax.storage import first_line
from speedit_jax.training.run import Run, open_run

WEIGHTS, SETTINGS, NUMBERS, GRID = "model.safetensors", "config.json", "metrics.json", "samples.png"


def publish_weights(workdir: Path, to: str, weights: str, checkpoint_step: str, licence: str | None, is_public: bool) -> None:
    """Uploads the weights of a run.

    Args:
      to: hf:OWNER/NAME.
      weights: ema, raw or ema_DECAY.
      checkpoint_step: newest, best or a number.
      licence: of the weights, as the hub spells it.
      is_public: whether a new repository is public.

    Raises:
      UserError: there are no such weights, they are not finite, or the hub cannot be reached or refuses them.
    """
    try:
        place = model_hub.parse(to)
        if place.revision or place.path:
            raise UserError("give hf:OWNER/NAME; an export is a new commit of its main branch")
        if not licence:
            raise UserError(
                "--license is missing, the terms under which others may use the weights: an identifier of the hub's list, as"
                " apache-2.0, mit or cc-by-nc-4.0, or other"
            )
        was_public = model_hub.check_access(place.repository)
        run = open_run(workdir, checkpoint_step, one_device())
        with tempfile.TemporaryDirectory() as scratch:
            try:
                write(Path(scratch), run, weights, place.repository, licence)
            except OSError as e:
                raise UserError(f"cannot write {scratch}, before the upload: {first_line(e)}; TMPDIR names another place") from e
            message = f"{run.config.model.name}, {weights} weights of step {run.step}"
            url, said = model_hub.publish(place.repository, Path(scratch), message, is_public)
    except UserError as e:
        raise UserError(f"--to={to}: {e}") from e
    for line in said:
        print(f"note: {line}")
    visible = is_public if was_public is None else was_public
    how = "public" if visible else "private: read its card, then make it public in its settings"
    print(f"{message} in {model_hub.address(place.repository)}\nThe repository is {how}\nCommit  {url}")


def write(directory: Path, run: Run, weights: str, repository: str, licence: str) -> None:
    """The files of the repository.

    Raises:
      UserError: there are no such weights, or they are not finite.
    """
    if unpublished(run):
        params, published = run.restore(weights), False
        state = own.named(jax.device_get(params))
        refuse_infinite(state, run, weights)
    else:
        exported = gather(run, weights)
        params, published, state = exported.params, True, file_state(exported)
    numbers = measured.numbers(run, weights)
    grid = measured.newest_grid(run)
    files.write_safetensors(directory / WEIGHTS, state)
    storage.write_json(directory / SETTINGS, public.settings(run))
    if numbers:
        storage.write_json(directory / NUMBERS, [number.record() for number in numbers])
    if grid:
        (directory / GRID).write_bytes(grid.read_bytes())
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    facts = card.Facts(run, weights, repository, licence, parameters, published, numbers, grid is not None)
    storage.write_text(directory / "README.md", card.write(facts))
