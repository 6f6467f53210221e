"""Draws images from a run's checkpoint, which knows its own config.

  python -m speedit_jax.sample --workdir=runs/digits --class_labels=0,1,2,3 --num_images=64 --out=samples.png

Writes an npz in ADM's format (arr_0 uint8 [N, H, W, C], arr_1 labels), a PNG grid of the first images and a JSON of all
settings; --png_files also each image. Stop it at any time and run the same command again: finished batches stay, and the
result is the same to the byte. With --multihost the processes share every batch, and the first writes.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from speedit_jax import cli, sharding
from speedit_jax.encoders.autoencoder import Autoencoder, open_autoencoder
from speedit_jax.errors import UserError
from speedit_jax.sampling.draw import draw_batches
from speedit_jax.sampling.labels import parse_labels, random_labels
from speedit_jax.sampling.sampler import Settings, make_sampler, resolve
from speedit_jax.sampling.writer import GRID, Output, checksum, claim
from speedit_jax.training.run import Run, open_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_OUT = flags.DEFINE_string("out", None, "Where to write: PATH.png, PATH.npz and PATH.json. Default: WORKDIR/sampled.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "How many images.", lower_bound=1)
_PNG_FILES = flags.DEFINE_bool("png_files", False, "Also each image, PATH/CLASS/NUMBER.png, for folder:PATH to read.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace images of other settings at --out, once these are drawn.")
_CLASS_LABELS = flags.DEFINE_list(
    "class_labels", None, "Classes, by name or number, taken in turn; or random. Default: all, in turn."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise: image i of a seed is the same whatever num_images is.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.", lower_bound=1)
_CHECKPOINT_STEP = flags.DEFINE_string("checkpoint_step", "newest", "newest, best (of the run's evaluations), or a number.")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "ema, raw, or ema_DECAY for one of training.extra_ema_decays.")
_VAE = flags.DEFINE_string("vae", None, "Of a run on latents: where its autoencoder is. Default: where it was in training.")
_SAMPLER = flags.DEFINE_string("sampler", None, "ddpm, ddim, dpm++; of flows euler, heun, sde. Default: the run's, as below.")
_NUM_STEPS = flags.DEFINE_string("num_steps", None, "Sampling steps: 50; of diffusion also ddim50, or 10,15,20 by section.")
_SPACING = flags.DEFINE_string("spacing", None, "Of the steps: even or logsnr.")
_ETA = flags.DEFINE_float("eta", None, "Noise of ddim and dpm++, 0 to 1.")
_GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Guidance, classifier-free or by --guide_workdir; 1 is none.")
_GUIDANCE_SCHEDULE = flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine.")
_GUIDANCE_LOW = flags.DEFINE_float("guidance_low", None, "Guide from this noise level on: 0 clean, 1 pure noise.")
_GUIDANCE_HIGH = flags.DEFINE_float("guidance_high", None, "And up to this one.")
_GUIDE_WORKDIR = flags.DEFINE_string("guide_workdir", None, "Autoguidance: a weaker run on the same data.")
_GUIDE_STEP = flags.DEFINE_integer("guide_step", None, "Its checkpoint. Default: the newest.")


def columns_for(labels: int, images: int) -> int | None:
    """As many columns as keep each class in columns of its own, about square; None where there are too many classes."""
    square = max(1, round(images**0.5))
    return labels * max(1, square // labels) if labels <= 2 * square else None


def sample() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the directory of a training run")
    run = open_run(_WORKDIR.value, _CHECKPOINT_STEP.value)
    model, mesh, workdir = run.model, run.mesh, run.workdir
    given = {
        "sampler": _SAMPLER.value,
        "num_steps": int(steps) if (steps := _NUM_STEPS.value or "").isdecimal() else steps or None,
        "spacing": _SPACING.value,
        "eta": _ETA.value,
        "guidance_scale": _GUIDANCE_SCALE.value,
        "guidance_schedule": _GUIDANCE_SCHEDULE.value,
        "guidance_low": _GUIDANCE_LOW.value,
        "guidance_high": _GUIDANCE_HIGH.value,
    }
    guide = open_guide(run)
    settings = Settings.from_config(run.config.sampling, model, guide and guide.model, **given)
    settings = resolve(settings, run.diffusion)
    autoencoder = open_autoencoder(_VAE.value, run.latents, model.image_shape[2], mesh)
    labels, asked = choose_labels(run.class_names)
    out = Path(_OUT.value).expanduser() if _OUT.value else workdir / "sampled"
    out = out.with_suffix("") if out.suffix in (".png", ".npz", ".json") else out

    sampler = make_sampler(model, run.diffusion, settings, mesh, guide and guide.model)
    params = run.restore(_WEIGHTS.value)
    params = (params, guide.restore(_WEIGHTS.value)) if guide else params
    batch = min(_BATCH_SIZE.value, len(labels))
    batch += -batch % sharding.batch_devices(mesh)
    record = {
        "workdir": str(workdir),
        "checkpoint_step": run.step,
        "weights": _WEIGHTS.value,
        "weights_sha256": checksum(params),
        "seed": _SEED.value,
        "num_images": len(labels),
        "class_labels": asked,
        "guide": guide and {"workdir": str(guide.workdir), "checkpoint_step": guide.step},
        **dataclasses.asdict(settings),
        "dtype": model.dtype,
        "latents": autoencoder and {**autoencoder.identity, "dtype": autoencoder.dtype},
        "batch_size": _BATCH_SIZE.value,
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "png_files": _PNG_FILES.value,
        "versions": run.meta["versions"] | {"sampled_with_jax": jax.__version__},
    }
    # Directories that folder: takes for classes; without classes it wants none.
    folders = tuple(name.replace("/", "_") for name in run.class_names) or ("",)
    output = Output(out, record, labels, batch, folders if _PNG_FILES.value else None)
    finished = claim(output, _OVERWRITE.value)
    if finished is not None:
        try:
            draw(sampler, params, autoencoder, output, finished)
            if jax.process_index() == 0:
                output.finish(None if asked == "random" else columns_for(len(asked), min(len(labels), GRID)))
        except OSError as e:
            raise UserError(f"cannot write to {out}: {e.strerror}; mend that and run the same command again") from e
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all is written")
    if jax.process_index() == 0:
        if finished is None:
            print("Already there, nothing to do:")
        how = f"{_WEIGHTS.value}, {settings.sampler}, {settings.num_steps} steps, guidance {settings.guidance_scale}"
        files = f", each in {out}/" if _PNG_FILES.value else ""
        print(f"{len(labels)} images of step {run.step} ({how}) in {out}.png, {out}.npz{files}, settings in {out}.json")


def choose_labels(class_names: list[str]) -> tuple[np.ndarray, list[int] | str]:
    """(int32 [N], classes that are taken in turn, or "random").

    Raises:
      UserError: no such class.
    """
    count, names = _NUM_IMAGES.value, _CLASS_LABELS.value
    if class_names and names == ["random"] and "random" not in class_names:
        return random_labels(jax.random.key(_SEED.value), count, len(class_names)), "random"
    classes = parse_labels(names, class_names)
    return classes[np.arange(count) % len(classes)].astype(np.int32), classes.tolist()


def open_guide(run: Run) -> Run | None:
    """The run of --guide_workdir, from which `run` is guided away; None where there is none.

    Raises:
      UserError: it is not there, or it predicts something else than `run` does.
    """
    if not _GUIDE_WORKDIR.value:
        if _GUIDE_STEP.value is not None:
            raise UserError(f"--guide_step={_GUIDE_STEP.value} needs --guide_workdir")
        return None
    try:
        guide = open_run(_GUIDE_WORKDIR.value, _GUIDE_STEP.value, run.mesh)
    except UserError as e:
        raise UserError(f"--guide_workdir: {e}") from e
    own, its = (
        {"image_shape": of.meta["image_shape"], "class_names": of.class_names}
        | {f"diffusion.{key}": value for key, value in of.config.diffusion.items() if key not in ("variance", "loss")}
        for of in (run, guide)
    )
    for name in sorted(own.keys() | its.keys()):
        if own.get(name) != its.get(name):
            raise UserError(
                f"--guide_workdir={guide.workdir}: its {name} is {its.get(name)}, but that of --workdir is {own.get(name)}"
            )
    return guide


def draw(sampler, params, autoencoder: Autoencoder | None, output: Output, finished: np.ndarray) -> None:
    """Draws the batches that are not finished; process 0 writes them."""
    writes = jax.process_index() == 0
    there = min(int(finished.sum()) * output.batch, len(output.labels))
    if writes and there and not finished.all():
        print(f"Going on: {there} of {len(output.labels)} images are there.")
    missing, key = np.flatnonzero(~finished).tolist(), jax.random.key(_SEED.value)
    with tqdm(total=len(output.labels), initial=there, unit="image", disable=not writes) as bar:
        for i, images in draw_batches(sampler, params, key, output.labels, output.batch, autoencoder, missing):
            if writes:
                bar.update(output.write(i, images))


if __name__ == "__main__":
    cli.run(sample)
