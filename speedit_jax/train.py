"""Trains a diffusion transformer.

  python -m speedit_jax.train --config=digits --workdir=runs/digits [--config.KEY=VALUE ...]

After an interruption, run the same command again: it resumes from the last checkpoint and ends with the same result.
"""

import contextlib
import functools
import math
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags
from clu import parameter_overview
from ml_collections import config_flags

from speedit_jax import cli, sharding, storage
from speedit_jax.data.folder import check_apart
from speedit_jax.data.joined import alone
from speedit_jax.data.sources import Source, open_source
from speedit_jax.errors import UserError
from speedit_jax.evaluation.during_training import Evaluation
from speedit_jax.evaluation.held_out import HeldOutLoss
from speedit_jax.reporting import console, wandb_board
from speedit_jax.reporting.curves import write_curves
from speedit_jax.reporting.environment import Environment
from speedit_jax.reporting.page import PROMPTS, write_report
from speedit_jax.reporting.telemetry import PEAK_FLOPS, Profiler, Telemetry
from speedit_jax.sampling.conditions import Labels, Prompts, stored_prompts
from speedit_jax.sampling.draw import NotFiniteError
from speedit_jax.sampling.examples import masked_examples
from speedit_jax.sampling.images import image_grid, magnification, write_png
from speedit_jax.sampling.sampler import FixedSamples, Settings, make_sampler, resolve
from speedit_jax.training import integrity, lock, run, topologies
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.batches import batches
from speedit_jax.training.check import check_numbers
from speedit_jax.training.checkpoint import Checkpoints, check_place, peek
from speedit_jax.training.finetune import start_from, starting_weights
from speedit_jax.training.nonfinite import Skips
from speedit_jax.training.set_aside import set_aside_damaged
from speedit_jax.training.state import TrainState
from speedit_jax.training.stop import INTERRUPTED, Stop
from speedit_jax.watchdog import Watchdog

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe or a config file, e.g. digits or mine.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, images.")
_CHANGES = flags.DEFINE_bool(
    "continue_with_changes", False, "Resume although settings or data have changed; the run records the changes."
)
_STRICT = flags.DEFINE_bool("strict", False, "Stop at a damaged checkpoint instead of resuming from the newest whole one.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Open the data, compile the step, print the memory it needs, and write nothing.")


def say(*lines: str) -> None:
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def make_drawings(parts: Assembly, source: Source, watchdog: Watchdog) -> tuple[FixedSamples | None, Evaluation | None]:
    """(the grids', the evaluation's): what training draws of the EMA weights, as far as the config wants it."""
    config, mesh = parts.config, parts.mesh
    if not config.training.sample_every and not config.evaluation.every:
        return None, None
    settings = resolve(Settings.from_config(config.sampling, parts.model), parts.diffusion)
    sampler = make_sampler(parts.model, parts.diffusion, settings, mesh)

    def samples(seed, count, conditions, sampler=sampler, pictures=None):
        devices = sharding.batch_devices(mesh)
        progress = functools.partial(watchdog.alive, "drawing samples")
        return FixedSamples(sampler, parts.autoencoder, conditions, jax.random.key(seed), count, devices, progress, pictures)

    def conditions(count):
        return stored_prompts(parts.texts, count) if parts.texts else Labels(np.arange(max(1, parts.model.num_classes)))

    images = config.sampling.grid_images
    if not config.training.sample_every:
        grids = None
    elif parts.model.hinted and (examples := masked_examples(parts, source, images)):
        pictures, of_examples = examples
        fill = make_sampler(parts.model, parts.diffusion, settings, mesh, pictures=pictures)
        grids = samples(config.seed, len(pictures.pictures), of_examples, fill, pictures)
    else:
        # A column for each prompt, as for each class.
        grids = samples(config.seed, images, conditions(round(images**0.5)))
    if not config.evaluation.every:
        return grids, None
    images = config.evaluation.num_images
    drawn = samples(config.evaluation.seed, images, conditions(images))
    return grids, Evaluation(config, source, drawn, settings.record(), mesh)


def first_state(parts: Assembly, checkpoints: Checkpoints, step: int, weights: dict, key: jax.Array) -> TrainState:
    """The state to resume from: that of a checkpoint, or the initial one."""
    if step:
        try:
            # Verified when damaged ones were set aside.
            state = checkpoints.restore(step, parts.shapes, parts.shardings, verify=False)
        except UserError as e:
            way = "; go on with the run's own settings, or start a new one from its weights with --config.init_from"
            raise UserError(f"{e}{way if _CHANGES.value else ''}") from e
        say(f"Resuming from the checkpoint of step {step}.")
        return state
    state = parts.initial_state(key)
    return start_from(state, weights) if weights else state


def open_telemetry(parts: Assembly, workdir: Path, step: int, started: float) -> Telemetry:
    config, mesh = parts.config, parts.mesh
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return Telemetry(
        workdir,
        first_step=step,
        num_steps=config.training.num_steps,
        batch_size=config.training.batch_size,
        # The share of the peak that one image a second takes.
        mfu_per_image=peak and parts.step_flops / (mesh.size * peak),
        started=started,
        wandb=wandb_board.open_board(workdir, config.training.wandb_project, config.to_dict()),
    )


def grid_path(workdir: Path, step: int) -> Path:
    return workdir / "samples" / f"step_{step:07d}.png"


def show_grid(grids: FixedSamples, state: TrainState, workdir: Path, step: int, telemetry: Telemetry) -> None:
    """Draws the EMA weights' samples to WORKDIR/samples and to the boards.

    Samples that are not finite do not stop training: its own steps are checked, and the sampler's settings, which may be at
    fault, can be changed afterwards.
    """
    try:
        (images,) = grids.draw(state.ema, grids.count)
    except NotFiniteError as e:
        telemetry.say(f"warning: no grid of samples at step {step}: {e}")
        return
    if jax.process_index() == 0:
        columns = grids.conditions.count if 1 < grids.conditions.count <= 16 else None
        if grids.pictures:
            # In pairs: what the network is told, and what it makes of it.
            columns = 2 * math.ceil((len(images) / 2) ** 0.5)
            images = np.stack([grids.pictures.told(), images], axis=1).reshape(-1, *images.shape[1:])
        path, grid = grid_path(workdir, step), image_grid(images, columns)
        write_png(path, grid, magnification(images.shape[1]))
        if isinstance(grids.conditions, Prompts) and not grids.pictures:
            storage.write_json(path.with_name(PROMPTS), grids.conditions.texts)
        telemetry.grid(step, grid, path)


def evaluate(evaluation: Evaluation, state: TrainState, step: int, telemetry: Telemetry) -> dict:
    """Measures the EMA weights; returns what the checkpoint says of it: nothing where samples are not finite (`show_grid`)."""
    since = time.perf_counter()
    try:
        values = evaluation(state.ema)
    except NotFiniteError as e:
        telemetry.say(f"warning: no evaluation at step {step}: {e}")
        telemetry.paused(since)
        return {}
    telemetry.also({f"eval_{name}": value for name, value in values.items()})
    telemetry.say(f"Step {step}: {console.spelled(values)}.")
    telemetry.paused(since)
    return {"evaluation": evaluation.record(values)}


def rescue(checkpoints: Checkpoints, telemetry: Telemetry, state: TrainState, meta: dict) -> None:
    """Saves the last whole step when an error ends the run. Of further errors nothing is said: the first is what to mend."""
    quiet = contextlib.suppress(Exception)
    # Processes save together, and the others do not know; and a step that failed has eaten its state.
    alone = jax.process_count() == 1 and not any(array.is_deleted() for array in jax.tree.leaves(state))
    if alone:
        with quiet:
            checkpoints.wait()  # removes the oldest, which makes room on a full disk
    told = False
    with quiet:
        telemetry.close()
        told = True
    if not alone:
        return
    with quiet:
        step = int(state.step)
        # A checkpoint promises that all metrics up to its step are on the disk.
        if told and step > (checkpoints.latest() or 0):
            checkpoints.save(step, state, meta)
            checkpoints.wait()
    with quiet:
        checkpoints.close()
    with quiet:
        if newest := peek(checkpoints.directory.parent):
            say(f"An error ends the run; step {newest[0]} is saved.")


def measure_held_out(held_out: HeldOutLoss, state: TrainState, telemetry: Telemetry, metrics: dict) -> None:
    """Logs the held-out loss of the EMA weights and of the raw ones with the step's metrics."""
    jax.block_until_ready(metrics)  # what the device still computes is not part of the pause
    since = time.perf_counter()
    for prefix, params in (("", state.ema), ("raw_", state.params)):
        telemetry.also({f"{prefix}heldout_{name}": value for name, value in held_out(params).items()})
    telemetry.paused(since)


def dry_run(parts: Assembly, source: Source) -> None:
    """Loads a batch and compiles the step; nothing is written."""
    next(batches(parts, source, 0, parts.config.training.num_steps))
    facts = topologies.measure(parts.lower_step().compile())
    say(sharding.table(parts.model.axes, parts.shapes.params), "The compiled step:", *topologies.lines(facts))


def train(config: ml_collections.ConfigDict, workdir: Path) -> int | None:
    started = time.perf_counter()
    check_numbers(config)
    wandb_board.check(config.training.wandb_project)
    check_place(workdir)
    run.settle(config, workdir)
    source = open_source(config.data)
    check_apart(alone(source), workdir, "workdir")
    mesh = sharding.make_mesh(config.mesh)
    parts = assemble(config, source, mesh)
    watchdog = Watchdog(config.training.hang_after)
    grids, evaluation = make_drawings(parts, source, watchdog)
    held_out = HeldOutLoss(parts, source) if config.evaluation.loss_every else None
    weights, lines = {}, console.opening(parts, source)
    if config.init_from and not peek(workdir):
        weights, taken_over = starting_weights(config.init_from, parts, source.class_names, _CHANGES.value)
        lines += [f"init from  {line}" for line in taken_over]
    if evaluation:
        lines.append(f"evaluation {evaluation}")
    if held_out:
        lines.append(f"held out   {held_out}")
    if _DRY_RUN.value:
        say(*lines)
        return dry_run(parts, source)
    with lock.held(workdir):
        lines += [f"damaged    {line}" for line in set_aside_damaged(workdir, _STRICT.value)]
        step, _ = peek(workdir) or (0, None)
        older = getattr(source, "older_fingerprints", ())
        meta = run.describe(config, source, parts.model.image_shape, parts.encoded_by)
        run.check_hosts(meta)
        meta, changed = run.claim(workdir, meta, step=step, older_fingerprints=older, with_changes=_CHANGES.value)
        say(*lines, *(f"settings   {line}" for line in changed))
        return go_on(parts, source, workdir, meta, weights, (grids, evaluation, held_out), watchdog, started)


def write_pages(workdir: Path) -> None:
    """Writes curves.png, then report.html."""
    if jax.process_index() == 0:
        write_curves(workdir)
        write_report(workdir)


def go_on(
    parts: Assembly,
    source: Source,
    workdir: Path,
    meta: dict,
    weights: dict,
    watching: tuple[FixedSamples | None, Evaluation | None, HeldOutLoss | None],
    watchdog: Watchdog,
    started: float,
) -> int | None:
    """Takes the steps that a run still lacks."""
    config, mesh, (grids, evaluation, held_out) = parts.config, parts.mesh, watching
    kept = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    checkpoints = Checkpoints(workdir, create=True, **kept)
    step, num_steps = checkpoints.latest() or 0, config.training.num_steps

    def drawn_at(step: int) -> bool:
        return grids is not None and (step % config.training.sample_every == 0 or step == num_steps)

    # An error of one process ends its run between a step and its grid, and the step is saved.
    lacks_grid = step > 0 and jax.process_count() == 1 and drawn_at(step) and not grid_path(workdir, step).exists()
    if step >= num_steps and not lacks_grid:
        say(f"This run is complete: {workdir} holds step {step} of {num_steps}.")
        # A kill after the last save leaves an earlier end's, or none.
        report, saved = workdir / "report.html", checkpoints.directory / str(step) / integrity.META
        if not report.exists() or storage.modified(report) < storage.modified(saved):
            write_pages(workdir)
        return say(*console.closing(workdir, parts.model, checkpoints.best()))
    if evaluation:
        evaluation.prepare(workdir)
    if held_out:
        held_out.prepare()
    watchdog.start()
    key = jax.random.key(config.seed)
    state, train_step = first_state(parts, checkpoints, step, weights, key), parts.jit_step()
    run.record(workdir, meta)
    say(f"Compiling, then training from step {step} to {num_steps}.")
    stop = Stop()
    telemetry = open_telemetry(parts, workdir, step, started)
    parameters = int(parameter_overview.count_parameters(parts.shapes.params))
    step_flops = parts.step_flops * config.training.batch_size
    profiler = Profiler(workdir, config.training.profile_at, config.training.profile_steps)
    skips = Skips(parts, int(state.skipped))

    try:
        environment = Environment(workdir, mesh, step, num_steps=num_steps, parameters=parameters, step_flops=step_flops)
        if lacks_grid:
            show_grid(grids, state, workdir, step, telemetry)
        for batch in watchdog.waiting_for(telemetry.waiting_for(batches(parts, source, step, num_steps))):
            profiler.before(step)
            with jax.set_mesh(mesh):
                state, metrics = train_step(state, batch, key)
            step += 1
            profiler.after(step, metrics)
            telemetry.step(step)
            skips.look(step, batch)
            last = step == num_steps
            evaluating = evaluation is not None and (step % config.evaluation.every == 0 or last)
            testing = held_out is not None and (step % config.evaluation.loss_every == 0 or last)
            if step % config.training.log_every == 0 or evaluating or testing or last:
                telemetry.say(skips.check(telemetry.metrics(step, metrics)))
            if testing:
                measure_held_out(held_out, state, telemetry, metrics)
            stopping = stop(step)
            drawing = drawn_at(step)
            saving = step % config.checkpoint.every == 0 or evaluating or last or stopping
            if drawing or saving:
                # Resume depends on this order: a checkpoint of step n promises that all the run shows up to n is on disk.
                jax.block_until_ready(metrics)  # what the device still computes is not part of the pause
                evaluated = evaluate(evaluation, state, step, telemetry) if evaluating else {}
                telemetry.say(skips.check(telemetry.flush()))
                since = time.perf_counter()
                if drawing:
                    show_grid(grids, state, workdir, step, telemetry)
                if saving:
                    watchdog.alive("saving a checkpoint")
                    checkpoints.save(step, state, meta | evaluated)
                    environment.write(step)
                telemetry.paused(since)
            if stopping and not last:
                break
        watchdog.alive("saving a checkpoint")
        checkpoints.wait()
    except Exception:
        rescue(checkpoints, telemetry, state, meta)
        raise

    watchdog.stop()
    profiler.close()
    best = checkpoints.best()
    checkpoints.close()
    telemetry.close()
    environment.write(step)
    write_pages(workdir)
    skipped = [f"Skipped          {text}" for text in filter(None, [skips.summary()])]
    if step < num_steps:
        say(
            *skipped,
            f"Stopped at step {step} of {num_steps}, everything is saved in {workdir}. Run the same command again to resume.",
        )
        return INTERRUPTED
    return say(*console.closing(workdir, parts.model, best), *skipped)


def main() -> int | None:
    file = None if _CONFIG.value is None else config_flags.get_config_filename(flags.FLAGS["config"])
    for name, value in (("config", file), ("workdir", _WORKDIR.value)):
        if not value:
            raise UserError(f"--{name} is missing; for example --config=digits --workdir=runs/digits")
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(f"--config={file}: cannot be read, or its get_config() does not return a ConfigDict")
    return train(_CONFIG.value, storage.path(_WORKDIR.value))


if __name__ == "__main__":
    cli.run(main, saves_on_sigterm=True)
