"""Computes the variational bound of a run in bits per dimension, over all noise levels.

  python -m speedit_jax.likelihood --workdir=runs/digits --split=held_out
  python -m speedit_jax.likelihood --workdir=runs/mine --source=folder:/path/to/images --num_images=1000 --num_steps=250

Of diffusion on pixels only. Prints the mean with its standard error and writes it with every term as JSON; docs/evaluation.md
says what the number is.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from speedit_jax import __version__, cli, sharding, storage
from speedit_jax.config import LARGEST_SEED, get_config
from speedit_jax.data import loader
from speedit_jax.data.image_sets import EvenlySpaced
from speedit_jax.data.sources import Source, open_source
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.likelihood import bound_terms, prior_bits
from speedit_jax.diffusion.schedules import respace, sampling_steps
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.sampling.draw import check_weights
from speedit_jax.sampling.sampler import image_noise
from speedit_jax.training.run import Run, open_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_SOURCE = flags.DEFINE_string("source", None, "The images, as data.source. Default: the run's.")
_SPLIT = flags.DEFINE_string("split", None, "Split, for digits (train, held_out) and tfds, as data.split. Default: the run's.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many images, evenly spaced. Default: all.", lower_bound=1)
_UNCONDITIONAL = flags.DEFINE_bool("unconditional", False, "Use the null label instead of the images' classes.")
_NUM_STEPS = flags.DEFINE_string("num_steps", None, "Use fewer noise levels, as in sampling; this defines another model.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=LARGEST_SEED)
_CHECKPOINT_STEP = flags.DEFINE_string("checkpoint_step", "newest", "newest, best (of the run's evaluations), or a number.")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "ema, raw, or ema_DECAY for one of training.extra_ema_decays.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Batch size over all devices.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers and all settings. Default: WORKDIR/likelihood.json.")

STEPS_AT_A_TIME = 50  # of the schedule, in one call: often enough for the progress bar


def likelihood() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the directory of a training run")
    run = open_run(_WORKDIR.value, _CHECKPOINT_STEP.value)
    config, model, mesh = run.config, run.model, run.mesh
    diffusion = choose_diffusion(run)
    if _UNCONDITIONAL.value and run.class_names and model.null_label is None:
        raise UserError("--unconditional: this model has no null label (model.label_dropout=0)")
    source = open_images(run)
    count = min(_NUM_IMAGES.value or len(source), len(source))
    out = storage.path(_OUT.value) if _OUT.value else run.workdir / "likelihood.json"
    if jax.process_index() == 0:
        storage.check_writable(out)
    params = run.restore(_WEIGHTS.value)
    check_weights(params)

    terms = measure(make_bound(model, diffusion, config.sampling.clip, mesh), params, source, count, diffusion, model, mesh)
    if jax.process_index() != 0:
        return
    total = terms["prior"] + terms["vb"].sum(axis=1)
    error = float(total.std(ddof=1) / count**0.5) if count > 1 else None
    means = {name: values.mean(axis=0) for name, values in terms.items()}
    record = {
        "total_bpd": total.mean(),
        "standard_error": error,
        "prior_bpd": means["prior"],
        "decoder_bpd": means["vb"][0],
        "by_timestep": {"t": diffusion.schedule.model_steps.tolist()}
        | {name: means[name].tolist() for name in ("vb", "mse", "x0_mse")},
        "images": {"from": config.data.source, "split": config.data.split, "n": count, "of": len(source)},
        "workdir": str(run.workdir),
        "checkpoint_step": run.step,
        "weights": _WEIGHTS.value,
        "unconditional": _UNCONDITIONAL.value,
        "num_steps": diffusion.schedule.num_steps,
        "clip": config.sampling.clip,
        "seed": _SEED.value,
        "batch_size": _BATCH_SIZE.value,
        "devices": mesh.size,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    storage.write_new(out, lambda partial: storage.write_json(partial, record))
    spread = "" if error is None else f" (standard error {error:.2g})"
    levels = diffusion.schedule.num_steps
    print(f"{count} images of {config.data.source} ({config.data.split}), step {run.step}, {levels} noise levels")
    print(f"at most {total.mean():.4f} bits per dimension{spread}: prior {means['prior']:.4f},", end=" ")
    print(f"denoising {means['vb'][1:].sum():.4f}, decoder {means['vb'][0]:.4f}")
    print(f"numbers and settings in {out}")


def choose_diffusion(run: Run) -> GaussianDiffusion:
    """The run's, of the noise levels of --num_steps.

    Raises:
      UserError: the run has no likelihood of pixels.
    """
    diffusion = run.diffusion
    if isinstance(diffusion, FlowMatching):
        raise UserError(f"--workdir: the run is a flow (diffusion.path={diffusion.path}), which has no variational bound")
    if run.text_encoder:
        raise UserError("--workdir: the run is on text; the bound is for runs on classes and unconditional ones")
    if run.encoded_by:
        raise UserError("--workdir: the run is on latents, and the bits of latents say nothing about pixels")
    if not _NUM_STEPS.value:
        return diffusion
    spec = int(_NUM_STEPS.value) if _NUM_STEPS.value.isdecimal() else _NUM_STEPS.value
    schedule = respace(diffusion.schedule, sampling_steps(diffusion.schedule.num_steps, spec))
    return GaussianDiffusion(schedule, diffusion.variance, diffusion.prediction)


def open_images(run: Run) -> Source:
    """--source, which is written into the run's config, too.

    Raises:
      UserError: the network knows no such images, or not their classes.
    """
    config = run.config
    if not _SOURCE.value and "imported_from" in run.meta and config.data.source == get_config().data.source:
        raise UserError("--source is missing: imported weights do not say which images they are of")
    config.data.source = _SOURCE.value or config.data.source
    config.data.split = _SPLIT.value or (config.data.split if not _SOURCE.value else "train")
    config.data.height, config.data.width, config.data.channels = run.meta["image_shape"]
    config.data.features = ""  # which only training wants
    source = open_source(config.data)
    if source.encoded_by:
        raise UserError(f"--source={config.data.source}: give images, not latents")
    if run.class_names and not _UNCONDITIONAL.value and list(source.class_names) != run.class_names:
        raise UserError(f"--source={config.data.source}: its classes differ from those of the run; give --unconditional")
    return source


def make_bound(model: Model, diffusion: GaussianDiffusion, clip: bool, mesh: Mesh) -> Callable[..., dict[str, np.ndarray]]:
    """bound(params, key, indices [B], images [B, H, W, C], labels [B], steps [k]) -> bound_terms and "prior" [B], on the host."""

    def bound(params, key, indices, images, labels, steps):
        terms = bound_terms(
            lambda x, t: sharding.constrain(model.apply(params, x, t, labels), ("batch", None, None, None)),
            images,
            steps,
            # So an image's noise does not depend on the batch that it is in.
            lambda step: image_noise(key, indices, step, model.image_shape),
            diffusion,
            clip,
        )
        return terms | {"prior": prior_bits(images, diffusion)}

    jitted, rows = jax.jit(bound, out_shardings=sharding.replicated(mesh)), sharding.batch_sharding(mesh)

    def run(params, key, indices, images, labels, steps):
        with jax.set_mesh(mesh):
            arrays = (sharding.from_host(rows, x) for x in (indices, images, labels))
            return jax.device_get(jitted(params, key, *arrays, jnp.asarray(steps)))

    return run


def measure(
    bound: Callable[..., dict[str, np.ndarray]],
    params,
    source: Source,
    count: int,
    diffusion: GaussianDiffusion,
    model: Model,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """All terms, in float64: "prior" [count], the others [count, T]."""
    num_steps, key = diffusion.schedule.num_steps, jax.random.key(_SEED.value)
    chunks = np.array_split(np.arange(num_steps), -(-num_steps // STEPS_AT_A_TIME))
    parts = []
    with tqdm(total=count * num_steps, unit="level", unit_scale=True, disable=jax.process_index() != 0) as bar:
        for indices, images, labels in filled_batches(source, count, mesh):
            if _UNCONDITIONAL.value and model.null_label is not None:
                labels = np.full_like(labels, model.null_label)
            inside = min(count - indices[0], len(indices))
            found = []
            for steps in chunks:
                found.append({name: x[:inside] for name, x in bound(params, key, indices, images, labels, steps).items()})
                bar.update(inside * len(steps))
            terms = {name: np.concatenate([f[name] for f in found], axis=1) for name in found[0] if name != "prior"}
            check_finite(indices[0], terms)
            parts.append(terms | {"prior": found[0]["prior"]})
    return {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}


def check_finite(first: int, terms: dict[str, np.ndarray]) -> None:
    """Raises a UserError that names the first image of which a term, [B, T], is not finite.

    Args:
      first: number of the first of these images.
    """
    bad = np.any([~np.isfinite(values) for values in terms.values()], axis=0)
    if bad.any():
        image, level = np.argwhere(bad)[0]
        raise UserError(
            f"image {first + image}: the bound is not finite at noise level {level}. Likely causes: weights that do not fit this"
            " config, or activations in bfloat16 (model.dtype)"
        )


def filled_batches(source: Source, count: int, mesh: Mesh) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(numbers, images, labels) of `count` evenly spaced records, in batches of one size; the last is filled up with repeats."""
    batch = min(_BATCH_SIZE.value, count)
    batch += -batch % sharding.batch_devices(mesh)
    first = 0
    for records in loader.in_order(EvenlySpaced(source, count), 0, count, batch, _THREADS.value):
        rows = np.arange(batch) % len(records["label"])
        yield np.arange(first, first + batch, dtype=np.int32), records["image"][rows], records["label"][rows].astype(np.int32)
        first += batch


if __name__ == "__main__":
    cli.run(likelihood)
