"""Draws images from a run's checkpoint, which knows its own config.

  python -m speedit_jax.sample --workdir=runs/digits --class_labels=0,1,2,3 --num_images=64 --out=samples.png
  python -m speedit_jax.sample --workdir=runs/blobs --prompt="a red blob at the top" --prompt="a blue blob" --num_images=16

Writes an npz in ADM's format (arr_0 uint8 [N, H, W, C], arr_1 labels), a PNG grid of the first images and a JSON of all
settings; --png_files also each image. Latents without an autoencoder are written as float32 (`latents`, `labels`), not as
pictures. Stop it at any time and run the same command again: finished batches stay, and the result is the same to the byte. With
a larger --num_images it adds to the images that are there. With --multihost the processes share every batch, and the first
writes.
"""

from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from speedit_jax import cli, sharding, storage
from speedit_jax.config import LARGEST_SEED, flatten
from speedit_jax.diffusion.inverse import METHODS
from speedit_jax.encoders.autoencoder import Autoencoder, open_autoencoder
from speedit_jax.errors import UserError
from speedit_jax.models.build import DTYPES
from speedit_jax.sampling.conditions import Conditions, Labels, Prompts
from speedit_jax.sampling.draw import check_weights, draw_batches, in_batches
from speedit_jax.sampling.images import to_uint8
from speedit_jax.sampling.known import Pictures, choose_plan, open_pictures, read_pictures
from speedit_jax.sampling.labels import parse_labels, random_labels
from speedit_jax.sampling.prompts import encode_prompts, open_encoder, read_prompts
from speedit_jax.sampling.sampler import Settings, check_given, make_sampler, resolve
from speedit_jax.sampling.writer import GRID, NETWORK, Output, checksum, claim, folder_names
from speedit_jax.training import changes
from speedit_jax.training.changes import same_latents
from speedit_jax.training.run import Run, open_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_OUT = flags.DEFINE_string("out", None, "Where to write: PATH.png, PATH.npz and PATH.json. Default: WORKDIR/sampled.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "How many images.", lower_bound=1)
_PNG_FILES = flags.DEFINE_bool("png_files", False, "Also write each image to PATH/CLASS/NUMBER.png (readable as folder:PATH).")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace images with other settings at --out, once the new ones are complete.")
_CLASS_LABELS = flags.DEFINE_list(
    "class_labels", None, "Classes by name or number, used in turn; or random. Default: all in turn."
)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "For a run on text: what to draw. Given several times, used in turn.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "The same from a file, one prompt a line; # begins a comment.")
_NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from. Default: the empty text.")
_TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Where the run's text encoder is now. Default: as in training.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the noise. Image i of a seed does not depend on num_images.", lower_bound=0, upper_bound=LARGEST_SEED
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Batch size over all devices; all batches are full.", lower_bound=1)
_MESH = flags.DEFINE_list(
    "mesh", [], "Share the weights among devices, for a model that does not fit one: fsdp=4 or fsdp=4,tensor=2. Default: whole."
)
_CHECKPOINT_STEP = flags.DEFINE_string("checkpoint_step", "newest", "newest, best (of the run's evaluations), or a number.")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "ema, raw, or ema_DECAY for one of training.extra_ema_decays.")
_VAE = flags.DEFINE_string(
    "vae", None, "For a run on latents: directory of its autoencoder. Default: as in training. none: latents."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ("auto", *DTYPES), "Precision of activations. Default: the run's model.dtype.")
_TILE = flags.DEFINE_bool("tile", False, "Decode latents in overlapping tiles, for images that do not fit in memory.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddpm, ddim or dpm++; for flows euler, heun or sde. Default, here and below: the run's sampling section."
)
_NUM_STEPS = flags.DEFINE_string(
    "num_steps", None, "Sampling steps, e.g. 50; for diffusion also ddim50, trailing50, or 10,15,20 by section."
)
_SPACING = flags.DEFINE_string("spacing", None, "Spacing of the steps: even or logsnr.")
_ETA = flags.DEFINE_float("eta", None, "Noise of ddim and dpm++, 0 to 1.")
_GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Guidance scale, classifier-free or with --guide_workdir; 1 is no guidance."
)
_GUIDANCE_CHANNELS = flags.DEFINE_integer("guidance_channels", None, "Leading channels that are guided; 0 is all.", lower_bound=0)
_GUIDANCE_SCHEDULE = flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine.")
_SPARSE_STRONG = flags.DEFINE_float("sparse_strong", None, "Share of tokens that skip the middle blocks, with --sparse_weak.")
_SPARSE_WEAK = flags.DEFINE_float("sparse_weak", None, "The same of the guide: sparse guidance, of models trained with a route.")
_PATH_DROP_GUIDANCE = flags.DEFINE_bool(
    "path_drop_guidance", None, "Of models trained with SPRINT: what guidance leads away from skips the middle blocks, too."
)
_GUIDANCE_LOW = flags.DEFINE_float("guidance_low", None, "Guide from this noise level on: 0 clean, 1 pure noise.")
_GUIDANCE_HIGH = flags.DEFINE_float("guidance_high", None, "Guide up to this noise level.")
_CLIP = flags.DEFINE_bool("clip", None, "Clip the predicted image to [-1, 1]; never for latents. Default: the run's.")
_IMAGE = flags.DEFINE_string("image", None, "Start from this picture, or complete it: a file, or a directory of files in turn.")
_MASK = flags.DEFINE_string("mask", None, "Fill where this picture is white, keep --image where it is black; or a directory.")
_STRENGTH = flags.DEFINE_float("strength", None, "Share of the steps that are run from --image on; 1 ignores what is not kept.")
_INPAINT = flags.DEFINE_enum(
    "inpaint",
    None,
    METHODS,
    "How the pixels that are kept guide the others. Default: network in a run with data.mask, else projection.",
)
_RESAMPLE = flags.DEFINE_integer("resample", None, "How often each --jump steps are run. Default: 10 for repaint, else 1.")
_JUMP = flags.DEFINE_integer("jump", None, "Sampling steps that --resample repeats. Default: 10.")
_GUIDE_WORKDIR = flags.DEFINE_string("guide_workdir", None, "Autoguidance: a weaker run on the same data.")
_GUIDE_STEP = flags.DEFINE_integer("guide_step", None, "Checkpoint step of --guide_workdir. Default: the newest.")


def columns_for(labels: int, images: int) -> int | None:
    """As many columns as keep each class in columns of its own, about square; None where there are too many classes."""
    square = max(1, round(images**0.5))
    return labels * max(1, square // labels) if labels <= 2 * square else None


def sample() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the directory of a training run")
    mesh = sharding.make_mesh(sharding.parse_mesh(_MESH.value))
    run = open_run(_WORKDIR.value, _CHECKPOINT_STEP.value, mesh, _DTYPE.value)
    model = run.model
    guide = open_guide(run)
    autoencoder = open_autoencoder(
        _VAE.value, run.encoded_by, model.image_shape[2], mesh, dtype=_DTYPE.value or "auto", tile=_TILE.value
    )
    latents = run.draws_latents and not autoencoder
    check_decoding(latents, autoencoder)
    settings = choose_settings(run, guide, autoencoder)
    out = storage.path(_OUT.value) if _OUT.value else run.workdir / "sampled"
    out = out.with_suffix("") if out.suffix in (".png", ".npz", ".json") else out
    if out.name in ("", ".."):
        raise UserError(f"--out={_OUT.value} names a directory; add a name for the files, such as {_OUT.value.rstrip('/')}/new")

    pictures = choose_pictures(run, autoencoder)
    sampler = make_sampler(model, run.diffusion, settings, mesh, guide and guide.model, pictures)
    params = run.restore(_WEIGHTS.value)
    params = (params, guide.restore(_WEIGHTS.value)) if guide else params
    check_weights(params)
    if _MESH.value and jax.process_index() == 0:
        held, whole = (size / 2**20 for size in sharding.weight_bytes(params))
        print(f"Weights: {held:.3g} MiB of {whole:.3g} MiB on each of {mesh.size} devices.")
    batch = _BATCH_SIZE.value + -_BATCH_SIZE.value % sharding.batch_devices(mesh)
    count = _NUM_IMAGES.value
    conditions, labels, asked = choose_conditions(run, settings, in_batches(count, batch))
    record = describe(run, guide, settings, autoencoder, asked, checksum(params))
    record |= {"known": {"image": _IMAGE.value, "mask": _MASK.value, **pictures.describe()}} if pictures else {}
    prompts = tuple(asked.get("prompts") or ())
    # Directories that folder: takes for classes; without classes it wants none.
    folders = folder_names(run.class_names) if not prompts and run.class_names else ("",) * (len(prompts) or 1)
    output = Output(out, record, labels[:count], batch, folders if _PNG_FILES.value else None, latents, prompts)
    finished = claim(output, _OVERWRITE.value)
    if finished is not None:
        try:
            draw(sampler, params, autoencoder, output, conditions, finished, pictures)
            if jax.process_index() == 0:
                random = asked["class_labels"] == "random"
                output.finish(None if random else columns_for(conditions.count, min(count, GRID)))
        except OSError as e:
            raise UserError(f"cannot write to {out}: {storage.reason(e)}; fix this and run the same command again") from e
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all is written")
    if jax.process_index() == 0:
        if finished is None:
            print("Nothing to do, these images are complete:")
        how = f"{_WEIGHTS.value}, {settings.sampler}, {settings.num_steps} steps, guidance {settings.guidance_scale}"
        files = f", each in {out}/" if _PNG_FILES.value else ""
        what = "latents" if latents else "images"
        print(f"{count} {what} of step {run.step} ({how}) in {output.grid}, {out}.npz{files}, settings in {out}.json")
        if latents:
            print(
                f"These are latents, not pictures: float32 in {out}.npz, three of their channels in {output.grid.name}."
                " For pictures name their autoencoder with --vae=DIR, and another --out."
            )


def check_decoding(latents: bool, autoencoder: Autoencoder | None) -> None:
    """Raises a UserError for flags that want pictures, or an autoencoder, where there is none.

    Args:
      latents: what is drawn are latents, which nothing decodes.
    """
    if latents and _PNG_FILES.value:
        raise UserError("--png_files: latents are no pictures; name the autoencoder that they are of, --vae=DIR")
    if _TILE.value and not autoencoder:
        raise UserError("--tile: nothing is decoded here; it is for latents and their autoencoder, --vae=DIR")


def choose_settings(run: Run, guide: Run | None, autoencoder: Autoencoder | None) -> Settings:
    """The run's, and those of the flags.

    Raises:
      UserError: the model cannot serve them.
    """
    given = {
        "sampler": _SAMPLER.value,
        "num_steps": int(steps) if (steps := _NUM_STEPS.value or "").isdecimal() else steps or None,
        "spacing": _SPACING.value,
        "eta": _ETA.value,
        "guidance_scale": _GUIDANCE_SCALE.value,
        "guidance_channels": _GUIDANCE_CHANNELS.value,
        "guidance_schedule": _GUIDANCE_SCHEDULE.value,
        "sparse_strong": _SPARSE_STRONG.value,
        "sparse_weak": _SPARSE_WEAK.value,
        "path_drop_guidance": _PATH_DROP_GUIDANCE.value,
        "guidance_low": _GUIDANCE_LOW.value,
        "guidance_high": _GUIDANCE_HIGH.value,
        "clip": _CLIP.value,
    }
    latents = autoencoder is not None or run.draws_latents
    settings = Settings.from_config(run.config.sampling, run.model, guide and guide.model, latents, **given)
    settings = resolve(settings, run.diffusion)
    check_given(given, settings)
    if guide and settings.guidance_scale == 1:
        raise UserError("--guide_workdir has no effect at guidance_scale=1; give another --guidance_scale")
    return settings


def describe(
    run: Run, guide: Run | None, settings: Settings, autoencoder: Autoencoder | None, asked: dict[str, Any], weights: str
) -> dict[str, Any]:
    """All that the images depend on, JSON.

    Args:
      asked: as `choose_conditions` returns it.
      weights: their checksum.
    """
    decoder = autoencoder and {**autoencoder.identity, "dtype": autoencoder.dtype}
    if _TILE.value:
        decoder["tile"] = True
    return {
        "workdir": str(run.workdir),
        "checkpoint_step": run.step,
        "weights": _WEIGHTS.value,
        "weights_sha256": weights,
        "seed": _SEED.value,
        "num_images": _NUM_IMAGES.value,
        **asked,
        "guide": guide and {"workdir": str(guide.workdir), "checkpoint_step": guide.step, NETWORK: network_of(guide)},
        **settings.record(),
        "dtype": run.model.dtype,
        NETWORK: network_of(run),
        "latents": decoder,
        "batch_size": _BATCH_SIZE.value,
        "devices": run.mesh.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        **({"mesh": dict(run.mesh.shape)} if _MESH.value else {}),
        "png_files": _PNG_FILES.value,
        "versions": run.meta["versions"] | {"sampled_with_jax": jax.__version__},
    }


def network_of(run: Run) -> dict[str, Any]:
    """What images depend on that the bytes of the weights do not tell, JSON: two imports of one file may differ in it alone."""
    settings = flatten({name: run.config[name].to_dict() for name in ("model", "diffusion")})
    told = {name: value for name, value in settings.items() if changes.kind_of(name) is not changes.Kind.ROUNDING}
    del told["model.dtype"]  # has a key of its own
    return {"image_shape": list(run.model.image_shape)} | told


def choose_conditions(run: Run, settings: Settings, count: int) -> tuple[Conditions, np.ndarray, dict[str, Any]]:
    """What the images are drawn of.

    Args:
      count: of the images, the last batch's extra ones too, so that a batch is the same to the bit when more are asked for later.

    Returns:
      The conditions; each image's class or prompt by number, int32 [count]; and for OUT.json which are taken in turn.

    Raises:
      UserError: no such class, no prompts for a run on text, or prompts for another.
    """
    if run.text_encoder:
        prompts, asked = choose_prompts(run, settings)
        return prompts, (np.arange(count) % prompts.count).astype(np.int32), {"class_labels": None, **asked}
    for flag in (_PROMPT, _PROMPTS_FILE, _NEGATIVE_PROMPT, _TEXT_ENCODER):
        if flag.value is not None:
            raise UserError(f"--{flag.name}: {run.workdir} was not trained on text; for a run on classes give --class_labels")
    names, class_names = _CLASS_LABELS.value, run.class_names
    if class_names and names == ["random"] and "random" not in class_names:
        labels = random_labels(jax.random.key(_SEED.value), count, len(class_names))
        return Labels(labels), labels, {"class_labels": "random"}
    classes = parse_labels(names, class_names)
    labels = classes[np.arange(count) % len(classes)].astype(np.int32)
    return Labels(classes), labels, {"class_labels": classes.tolist()}


def choose_prompts(run: Run, settings: Settings) -> tuple[Prompts, dict[str, Any]]:
    """The encoded prompts, and what OUT.json says of them.

    Raises:
      UserError: there are none, or the flags do not fit a run on text.
    """
    if _CLASS_LABELS.value is not None:
        raise UserError(f"--class_labels: {run.workdir} was trained on text; give --prompt")
    if _PROMPT.value and _PROMPTS_FILE.value:
        raise UserError("give --prompt or --prompts_file, not both")
    if not _PROMPT.value and not _PROMPTS_FILE.value:
        raise UserError(f'{run.workdir} was trained on text: give --prompt="TEXT", or --prompts_file=FILE')
    if _NEGATIVE_PROMPT.value is not None and settings.guidance_scale == 1:
        raise UserError("--negative_prompt has no effect without guidance; give --guidance_scale above 1")
    if _NEGATIVE_PROMPT.value is not None and _GUIDE_WORKDIR.value:
        raise UserError("--negative_prompt has no effect with --guide_workdir, whose network gets the prompts themselves")
    if _NEGATIVE_PROMPT.value is not None and settings.sparse:
        raise UserError("--negative_prompt has no effect with --sparse_weak: the network with fewer tokens gets the prompts, too")
    texts = _PROMPT.value or read_prompts(storage.path(_PROMPTS_FILE.value))
    encoder = open_encoder(_TEXT_ENCODER.value, run.text_encoder, run.model.text)
    negative = _NEGATIVE_PROMPT.value or ""
    prompts, warnings = encode_prompts(encoder, texts, negative, run.model.text)
    if jax.process_index() == 0:
        print(*(f"warning: {warning}" for warning in warnings), sep="\n", end="\n" if warnings else "")
    return prompts, {"prompts": list(texts), "negative_prompt": negative, "text_encoder": encoder.identity}


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
        guide = open_run(_GUIDE_WORKDIR.value, _GUIDE_STEP.value, run.mesh, _DTYPE.value)
    except UserError as e:
        raise UserError(f"--guide_workdir: {e}") from e
    own, its = (
        {"image_shape": of.meta["image_shape"], "class_names": of.class_names, "text": _encoder(of)}
        | {f"diffusion.{key}": value for key, value in of.config.diffusion.items() if key not in ("variance", "loss")}
        for of in (run, guide)
    )
    for name in sorted(own.keys() | its.keys()):
        if own.get(name) != its.get(name):
            raise UserError(f"--guide_workdir={guide.workdir}: its {name} is {its.get(name)}, but --workdir has {own.get(name)}")
    if run.encoded_by and guide.encoded_by and not same_latents(run.encoded_by, guide.encoded_by):
        drawn = f"the latents of {guide.encoded_by['vae']}, but --workdir draws those of {run.encoded_by['vae']}"
        raise UserError(f"--guide_workdir={guide.workdir}: it draws {drawn}, another autoencoder")
    return guide


def _encoder(run: Run) -> dict[str, Any] | None:
    """The identity of a run's text encoder, wherever it lies; None without text."""
    return run.text_encoder and {key: value for key, value in run.text_encoder.items() if key != "encoder"}


def choose_pictures(run: Run, autoencoder: Autoencoder | None) -> Pictures | None:
    """--image and --mask; None without.

    Raises:
      UserError: they cannot be read, or do not fit the run or the other flags.
    """
    if not _IMAGE.value:
        given = [flag for flag in (_MASK, _STRENGTH, _INPAINT, _RESAMPLE, _JUMP) if flag.value is not None]
        if given:
            raise UserError(f"--{given[0].name}={given[0].value} needs --image")
        return None
    if run.draws_latents and not autoencoder:
        raise UserError("--image: this run draws latents; name the autoencoder that they are of, --vae=DIR")
    plan = choose_plan(_MASK.value is not None, run.model.hinted, _STRENGTH.value, _INPAINT.value, _RESAMPLE.value, _JUMP.value)
    shape = run.model.image_shape
    drawn = autoencoder.image_shape(shape) if autoencoder else shape
    return open_pictures(*read_pictures(_IMAGE.value, _MASK.value, drawn, run.config.data.background), plan, shape, autoencoder)


def draw(
    sampler,
    params,
    autoencoder: Autoencoder | None,
    output: Output,
    conditions: Conditions,
    finished: np.ndarray,
    pictures: Pictures | None,
) -> None:
    """Draws the batches that are not finished; process 0 writes them."""
    writes, count = jax.process_index() == 0, len(output.labels)
    there = min(int(finished.sum()) * output.batch, count)
    if writes and there and not finished.all():
        print(f"Resuming: {there} of {count} images are finished.")
    missing, key = np.flatnonzero(~finished).tolist(), jax.random.key(_SEED.value)
    with tqdm(total=count, initial=there, unit="image", disable=not writes) as bar:
        for i, images in draw_batches(sampler, params, key, conditions, count, output.batch, autoencoder, missing):
            if writes:
                images = images if output.latents else to_uint8(images)
                bar.update(output.write(i, pictures.composite(i * output.batch, images) if pictures else images))


if __name__ == "__main__":
    cli.run(sample)
