"""Trains a diffusion transformer.

  python -m speedit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.KEY=VALUE ...]

Run the same command again after an interruption and it goes on from the last checkpoint, to the same result.
"""

import dataclasses
import signal
import time
from pathlib import Path

import jax
import ml_collections
from absl import flags
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import config_flags

from speedit_jax import cli
from speedit_jax.data import loader
from speedit_jax.data.sources import Source, open_source
from speedit_jax.errors import UserError
from speedit_jax.kernels.gla import GLA_PAYS_FROM
from speedit_jax.models.build import Model, parse_name
from speedit_jax.training import builders, deviceless, run, sharding
from speedit_jax.training.checkpoint import Checkpoints, newest_step
from speedit_jax.training.curves import write_curves
from speedit_jax.training.environment import HUGE_PAGES, Environment, huge_pages_left_out
from speedit_jax.training.evaluation import Evaluation
from speedit_jax.training.finetune import start_from, starting_weights
from speedit_jax.training.report import write_report
from speedit_jax.training.sampling import Pictures, Settings, make_sampler, resolve
from speedit_jax.training.state import initial_state, make_optimizer, state_shardings
from speedit_jax.training.step import make_train_step
from speedit_jax.training.telemetry import PEAK_FLOPS, Profiler, Telemetry
from speedit_jax.training.wandb_board import open_board

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/digits.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, images.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Open the data, compile the step, say what it takes, and write nothing.")

INTERRUPTED = 130  # exit code of a run that was asked to stop and can go on


class Stop:
    """Whether the run was asked to stop: by Ctrl-C or SIGTERM here, by the scheduler's notice on several hosts."""

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        del frame
        self._asked = True
        # Once more ends the process at once, even in the middle of a compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once", flush=True)

    def __call__(self, step: int) -> bool:
        # On several hosts all must stop after the same step: jax's coordinator, which also catches SIGTERM, picks it.
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def report(config: ml_collections.ConfigDict, model: Model, params, strategy, source: Source, mesh) -> None:
    """What is about to run."""
    classes = len(source.class_names)
    say(f"data       {config.data.source}: {len(source)} images {source.image_shape}, {classes or 'no'} classes")
    say(
        f"model      {config.model.name}: {parameter_overview.count_parameters(params):,} parameters, {model.dtype} activations,"
        f" {model.mixer} mixer, remat {config.model.remat}"
    )
    say(f"           {model.tokens:,} tokens, {3 * model.forward_flops / 1e9:,.3g} GFLOP an image and training step")
    if parse_name(config.model.name)[0] == "DiG" and model.tokens < GLA_PAYS_FROM:
        say(f"           at {model.tokens} tokens DiT is as fast or faster; GLA pays from about {GLA_PAYS_FROM} on (docs/gla.md)")
    say(f"timesteps  {strategy.describe(config.training.batch_size)}")
    devices = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
    device = mesh.devices.flat[0]
    say(f"devices    {mesh.size} {device.device_kind}, {jax.process_count()} processes: {devices}")
    if device.platform == "cpu" and huge_pages_left_out():
        say(f"           faster with GLIBC_TUNABLES={HUGE_PAGES} before the command (docs/training.md)")


def make_drawings(
    config: ml_collections.ConfigDict, source: Source, model: Model, diffusion, mesh, autoencoder
) -> tuple[Pictures | None, Evaluation | None]:
    """(the grids', the evaluation): what training draws of the EMA weights, as far as the config wants it."""
    if not config.training.sample_every and not config.evaluation.every:
        return None, None
    settings = resolve(Settings.from_config(config.sampling, model), diffusion)
    sampler = make_sampler(model, diffusion, settings, mesh)

    def pictures(seed, count):
        return Pictures(sampler, autoencoder, model.num_classes, jax.random.key(seed), count, sharding.batch_devices(mesh))

    grids = pictures(config.seed, config.sampling.grid_images) if config.training.sample_every else None
    if not config.evaluation.every:
        return grids, None
    drawn = pictures(config.evaluation.seed, config.evaluation.num_images)
    return grids, Evaluation(config, source, drawn, dataclasses.asdict(settings), mesh)


def train(config: ml_collections.ConfigDict, workdir: Path) -> int | None:
    started = time.perf_counter()
    builders.check_numbers(config)
    source = open_source(config.data)
    mesh = sharding.make_mesh(config.mesh)
    builders.check_batch(config, mesh)
    diffusion = builders.make_diffusion(config)
    strategy = builders.make_strategy(config, diffusion)
    optimizer = make_optimizer(config)
    autoencoder = builders.make_autoencoder(config, source, mesh)
    # Either the source holds latents already, or its images are encoded as they come, or it is images that are learned.
    online = autoencoder is not None and source.latents is None
    latents = autoencoder.identity if online else source.latents
    image_shape = autoencoder.latent_shape(source.image_shape) if online else source.image_shape
    model = builders.make_model(config, mesh, image_shape, len(source.class_names))
    num_steps, batch_size = config.training.num_steps, config.training.batch_size
    with jax.set_mesh(mesh):
        shapes, shardings = state_shardings(mesh, model, optimizer, strategy, config.training.extra_ema_decays)
    grids, evaluation = make_drawings(config, source, model, diffusion, mesh, autoencoder)
    weights, lines = {}, []
    if config.init_from and newest_step(workdir) is None:
        weights, lines = starting_weights(config.init_from, model, diffusion.prediction, shapes.params, mesh)
    meta = run.describe(config, source, image_shape, latents)
    if not _DRY_RUN.value:
        run.claim(workdir, meta)
    report(config, model, shapes.params, strategy, source, mesh)
    for line in lines:
        say(f"init from  {line}")
    if evaluation:
        say(f"evaluation {evaluation}")
    if latents:
        pictures = "" if autoencoder else "; pictures show three channels of latents, for data.vae names no autoencoder"
        say(f"latents    {model.image_shape} of {latents['vae']}, {'encoded at each step' if online else 'stored'}{pictures}")

    key = jax.random.key(config.seed)
    rows_sharding = sharding.batch_sharding(mesh)
    rows = sharding.local_rows(rows_sharding, batch_size)
    train_step = jax.jit(
        make_train_step(model, diffusion, strategy, optimizer, config, latents),
        in_shardings=(shardings, rows_sharding, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )

    def batches(first_step):
        """What the step takes, from step `first_step` on."""
        for batch in loader.batches(
            source,
            seed=config.seed,
            batch_size=batch_size,
            rows=rows,
            first_step=first_step,
            num_steps=num_steps,
            flip=config.data.flip,
            threads=config.data.threads,
        ):
            batch = {name: sharding.global_array(rows_sharding, batch_size, rows, values) for name, values in batch.items()}
            if online:
                batch["moments"] = autoencoder.moments(batch.pop("image"))
            yield batch

    if _DRY_RUN.value:
        with jax.set_mesh(mesh):
            compiled = train_step.lower(shapes, next(batches(0)), key).compile()
        say(
            "\n".join(
                [sharding.table(model.axes, shapes.params), "The compiled step:", *deviceless.lines(deviceless.measure(compiled))]
            )
        )
        return None
    checkpoints = Checkpoints(
        workdir, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every, create=True
    )
    step = checkpoints.latest() or 0
    if step >= num_steps:
        say(f"This run is complete: {workdir} holds step {step} of {num_steps}.")
        return say_next(workdir, model, checkpoints.best())
    if evaluation:
        evaluation.prepare(workdir)
    if step:
        state = checkpoints.restore(step, shapes, shardings)
        say(f"Going on from the checkpoint of step {step}.")
    else:
        decays = config.training.extra_ema_decays
        init = jax.jit(lambda k: initial_state(model, optimizer, strategy, k, decays), out_shardings=shardings)
        with jax.set_mesh(mesh):
            state = init(key)
            state = start_from(state, weights) if weights else state
    say(f"Compiling; then training from step {step} to {num_steps}.")
    stop = Stop()
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    # The share of the peak that one image a second takes.
    mfu = peak and 3 * model.forward_flops / (mesh.size * peak)
    telemetry = Telemetry(
        workdir,
        first_step=step,
        num_steps=num_steps,
        batch_size=batch_size,
        mfu_per_image=mfu,
        started=started,
        wandb=open_board(workdir, config.training.wandb_project, meta["config"]),
    )
    parameters = int(parameter_overview.count_parameters(shapes.params))
    environment = Environment(workdir, mesh, step, parameters=parameters, step_flops=int(3 * model.forward_flops * batch_size))
    columns = model.num_classes if 1 < model.num_classes <= 16 else None  # of the grids
    profiler = Profiler(workdir, config.training.profile_at, config.training.profile_steps)

    for batch in telemetry.waiting_for(batches(step)):
        profiler.before(step)
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch, key)
        step += 1
        profiler.after(step, metrics)
        telemetry.step(step)
        last = step == num_steps
        evaluating = evaluation is not None and (step % config.evaluation.every == 0 or last)
        if step % config.training.log_every == 0 or evaluating or last:
            check_finite(telemetry.metrics(step, metrics), config)
        stopping = stop(step)
        drawing = grids is not None and (step % config.training.sample_every == 0 or last)
        saving = step % config.checkpoint.every == 0 or evaluating or last or stopping
        if drawing or saving:
            # Resume depends on this order: a checkpoint of step n promises that all the run shows up to n is on disk.
            jax.block_until_ready(metrics)  # what the device still computes is not part of the pause
            evaluated = {}
            if evaluating:
                since = time.perf_counter()
                values = evaluation(state.ema)
                telemetry.also({f"eval_{name}": value for name, value in values.items()})
                telemetry.say(f"Step {step}: {spelled(values)}.")
                evaluated = {"evaluation": evaluation.record(values)}
                telemetry.paused(since)
            check_finite(telemetry.flush(), config)
            since = time.perf_counter()
            if drawing:
                (images,) = grids.draw(state.ema, grids.count)
                telemetry.images(workdir / "samples" / f"step_{step:07d}.png", step, images, columns)
            if saving:
                checkpoints.save(step, state, meta | evaluated)
                environment.write(step)
            telemetry.paused(since)
        if stopping and not last:
            break

    profiler.close()
    checkpoints.wait()
    best = checkpoints.best()
    checkpoints.close()
    telemetry.close()
    environment.write(step)
    if jax.process_index() == 0:
        write_curves(workdir)
        write_report(workdir)
    if step < num_steps:
        say(f"Stopped at step {step} of {num_steps}, all saved in {workdir}. Run the same command again to go on.")
        return INTERRUPTED
    return say_next(workdir, model, best)


def check_finite(written: dict[str, float] | None, config: ml_collections.ConfigDict) -> None:
    """Stops a run that has stopped learning."""
    limit = config.training.max_skipped_in_a_row
    if written and written["skipped_in_a_row"] >= limit:
        raise UserError(
            f"the last {written['skipped_in_a_row']:.0f} gradients were not finite (training.max_skipped_in_a_row={limit});"
            " lower optim.learning_rate or set model.dtype=float32, and go on in a new --workdir"
        )


def spelled(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def say_next(workdir: Path, model: Model, best: tuple[int, dict[str, float]] | None) -> None:
    say(f"\nCheckpoints      {workdir}/checkpoints")
    say(f"Metrics          {workdir}/metrics.jsonl, {workdir}/curves.png, tensorboard --logdir={workdir}/tensorboard")
    say(f"Samples          {workdir}/samples")
    if best:
        step, values = best
        say(f"Best             step {step}, {spelled(values)}; --checkpoint_step=best draws from it")
    say(f"All on one page  {workdir}/report.html; python -m speedit_jax.report --workdir={workdir} makes it again")
    labels = " --class_labels=0,1,2,3" if model.num_classes > 3 else ""
    say(f"Next             python -m speedit_jax.sample --workdir={workdir}{labels} --num_images=64 --out={workdir}/new.png")


def main() -> int | None:
    file = None if _CONFIG.value is None else config_flags.get_config_filename(flags.FLAGS["config"])
    for name, value in (("config", file), ("workdir", _WORKDIR.value)):
        if not value:
            raise UserError(f"--{name} is missing; for example --config=configs/digits.py --workdir=runs/digits")
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(f"--config={file}: cannot be read, or its get_config() does not return a ConfigDict")
    return train(_CONFIG.value, Path(_WORKDIR.value).expanduser())


if __name__ == "__main__":
    cli.run(main, saves_on_sigterm=True)
