"""Imports weights as a directory to sample from, and exports a run's weights.

  python -m speedit_jax.convert --from=DiT-XL-2-256x256.pt --workdir=runs/dit_xl [--config.KEY=VALUE ...]
  python -m speedit_jax.convert --workdir=runs/mine --to=mine.safetensors [--weights=raw] [--checkpoint_step=N]

FILE.pt and FILE.safetensors hold the names of the published PyTorch code of DiT (which fast-DiT, SpeeD and SiT share) or DiG, a
directory is a diffusers DiTTransformer2DModel. docs/weights.md says what is exact and what is not.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from speedit_jax import cli, sharding
from speedit_jax.config import complete
from speedit_jax.encoders.autoencoder import Autoencoder, open_autoencoder
from speedit_jax.errors import UserError
from speedit_jax.interop import dig, dit, files, pipeline
from speedit_jax.interop.dit import Network
from speedit_jax.interop.layout import COMPUTED, Table
from speedit_jax.models.build import SIZES, Model, parse_name
from speedit_jax.models.layers import sincos_position_table
from speedit_jax.training import assembly, run
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.diffusers_export import diffusers_label, no_pipeline, refuse_diffusers

_FROM = flags.DEFINE_string("from", None, "Import: FILE.pt, FILE.safetensors or a diffusers directory.")
_TO = flags.DEFINE_string("to", None, "Export: OUT.pt, OUT.safetensors, or OUT/ for a diffusers directory.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Import: a new directory. Export: the directory of a run.")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "Export: ema, raw, or ema_DECAY for one of training.extra_ema_decays.")
_CHECKPOINT_STEP = flags.DEFINE_string("checkpoint_step", "newest", "Export: newest, best, or a number.")
_VAE = flags.DEFINE_string("vae", None, "Export to diffusers: where the autoencoder is. Default: where it was in training.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Import: --config.KEY=VALUE replaces what the file says or leaves open.", lock_config=True
)

# The published EMA also averages the position table, in float32, and so lets it drift; a learned table is far from this.
_POSITIONS_TOLERANCE = 0.01
# What SiT's training writes down -> config.diffusion.path.
SIT_PATHS = {"Linear": "linear", "GVP": "gvp"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file or directory holds.

    Attributes:
      network: what its tensors, or its config.json, say.
      raw, ema: name -> array; the same where there is only one.
      diffusers: whether the names are diffusers'.
      path: config.diffusion.path.
      notes: what the user ought to know.
    """

    network: Network
    raw: Mapping[str, np.ndarray]
    ema: Mapping[str, np.ndarray]
    diffusers: bool = False
    path: str = "vp"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NoSource:
    """Stands for the data in the description of a run that saw none here."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str = "imported"


# Import


def read(path: Path) -> Weights:
    """What is at `path`.

    Raises:
      UserError: nothing, or nothing that we know.
    """
    if path.is_dir():
        return read_diffusers(path)
    if not path.exists():
        raise UserError("there is no such file or directory")
    if path.suffix == ".safetensors":
        state = files.read_safetensors(path)
        return published(state, state)
    content = files.read_pt(path)
    if not content.keys() & {"model", "ema"}:
        state = files.arrays(content)
        return published(state, state)
    raw, ema = (files.arrays(content[key]) if content.get(key) else None for key in ("model", "ema"))
    settings = getattr(content.get("args"), "saved", None)
    flow = settings.get("path_type") if isinstance(settings, dict) else None
    if flow and (flow not in SIT_PATHS or settings.get("prediction", "velocity") != "velocity"):
        raise UserError(
            f"a SiT of path {flow} that predicts {settings.get('prediction')}; known are velocities of {', '.join(SIT_PATHS)}"
        )
    weights = published(raw or ema, ema or raw)
    return dataclasses.replace(weights, path=SIT_PATHS[flow]) if flow else weights


def published(raw: Mapping[str, np.ndarray], ema: Mapping[str, np.ndarray]) -> Weights:
    """Tensors under the names of the published code."""
    if not dig.is_dig(ema):
        return Weights(dit.describe(ema), raw, ema)
    one = raw is ema
    ema = dig.without_aliases(ema)
    return Weights(dig.describe(ema), ema if one else dig.without_aliases(raw), ema)


def read_diffusers(path: Path) -> Weights:
    """A DiTTransformer2DModel's directory, or the pipeline's around it."""
    path = path if (path / "config.json").is_file() else path / "transformer"
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"it has no config.json of a diffusers DiT ({files.first_line(e)})") from e
    network = dit.describe_diffusers(config)
    safe, pickled = path / "diffusion_pytorch_model.safetensors", path / "diffusion_pytorch_model.bin"
    if not safe.exists() and not pickled.exists():
        raise UserError(f"it holds no {safe.name}")
    state = files.read_safetensors(safe) if safe.exists() else files.arrays(files.read_pt(pickled))
    eps = config.get("norm_eps", 1e-5)
    note = f"approximate: its second norms divide by sqrt(variance + {eps:g}), ours by sqrt(variance + {dit.NORM_EPS:g})"
    return Weights(network, state, state, diffusers=True, notes=() if eps == dit.NORM_EPS else (note,))


def make_config(weights: Weights, given: Mapping[str, Any]) -> tuple[ml_collections.ConfigDict, NoSource]:
    """The config of a network that was trained elsewhere, and its images and classes; `given` wins.

    Raises:
      UserError: something that neither the file nor `given` tells.
    """
    network = weights.network
    backbone, width, depth = network.backbone, network.width, network.depth
    heads = given.get("model.heads") or network.heads
    known = [
        size
        for size, values in SIZES[backbone].items()
        if values[:2] == (width, depth) and heads in (0, values[2]) and network.mlp_ratio == 4
    ]
    if not known and not heads:
        raise UserError(f"the tensors do not tell how many heads their width of {width} has: give --config.model.heads=N")
    config = _CONFIG.value
    config.model.name = f"{backbone}-{known[0] if known else 'tiny'}/{network.patch}"
    sizes = (0, 0, 0) if known else (width, depth, heads)
    if network.out_channels not in (network.channels, 2 * network.channels):
        raise UserError(f"final_layer.linear.weight makes {network.out_channels} channels of {network.channels}: not C or 2C")
    learned = network.out_channels != network.channels
    latents = network.channels > 3
    side = math.isqrt(network.tokens) * network.patch
    values = {
        **dict(zip(("model.width", "model.depth", "model.heads"), sizes, strict=True)),
        "model.mlp_ratio": network.mlp_ratio,
        "model.norm": network.norm,
        "model.convolution": network.convolution,
        "model.time_freq_shift": int(weights.diffusers),
        "diffusion.path": weights.path,
        "diffusion.variance": "learned_range" if learned else "fixed_large",
        "data.height": side,
        "data.width": side,
        "data.channels": network.channels,
        "sampling.clip": not latents,
        # As in the published samples of latents; diffusers guides all channels.
        "sampling.guidance_channels": 3 if latents and not weights.diffusers else 0,
    }
    config.update_from_flattened_dict(values | dict(given))

    height, width = config.data.height, config.data.width
    patches = (height // network.patch) * (width // network.patch)
    if not patches or patches != (network.tokens or patches):
        told = (
            f"{COMPUTED} has {network.tokens} positions, not {height} x {width} pixels'" if network.tokens else f"no {COMPUTED}"
        )
        raise UserError(f"{told}: give the size of images or latents, --config.data.height=H --config.data.width=W")
    null = config.model.label_dropout > 0 and network.label_rows > 0
    classes = tuple(str(i) for i in range(network.label_rows - null))
    return config, NoSource((height, width, network.channels), classes)


def check_positions(given: np.ndarray, height: int, width: int) -> float:
    """How far a position table [1, T, D] is from ours for a height x width grid.

    Raises:
      UserError: further than averaging in float32 brings it.
    """
    error = float(np.abs(given[0] - sincos_position_table(height, width, given.shape[2])).max())
    if not error <= _POSITIONS_TOLERANCE:
        raise UserError(f"{COMPUTED} is not the sine-cosine table of a {height} x {width} grid, but up to {error:.3g} off")
    return error


def autoencoder_of(config: ml_collections.ConfigDict, channels: int) -> dict[str, Any] | None:
    """The identity of data.vae, which draws pictures of what a network of so many channels makes; None without one.

    Raises:
      UserError: it cannot be read, or has another number of channels.
    """
    where = config.data.vae
    if not where:
        return None
    autoencoder = Autoencoder(where, one_device())
    if autoencoder.channels != channels:
        raise UserError(f"--config.data.vae={where} has latents of {autoencoder.channels} channels, the network draws {channels}")
    return autoencoder.identity


def import_weights(path: Path, workdir: Path, given: Mapping[str, Any]) -> None:
    try:
        weights = read(path)
        config, source = make_config(weights, given)
        network, patch = weights.network, weights.network.patch
        height, width, _ = source.image_shape
        model = assembly.make_model(config, one_device(), source.image_shape, len(source.class_names))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        arrange = dit.from_diffusers if weights.diffusers else table(network.backbone).from_torch
        ema = arrange(weights.ema, shapes, patch)
        params = ema if weights.raw is weights.ema else arrange(weights.raw, shapes, patch)
        notes = list(weights.notes) + dig_notes(config, network.depth, (height, width))
        if COMPUTED in weights.ema:
            error = check_positions(weights.ema[COMPUTED], height // patch, width // patch)
            if error > 1e-6:
                notes.append(f"its {COMPUTED} is up to {error:.1g} off the table it started from, which is ours")
    except UserError as e:
        raise UserError(f"--from={path}: {e}") from e

    latents = autoencoder_of(config, network.channels)
    meta = run.describe(config, source, source.image_shape, latents) | {"imported_from": str(path)}
    run.claim(workdir, meta)
    checkpoints = Checkpoints(workdir, create=True)
    checkpoints.save_weights(0, params, ema, meta)
    checkpoints.wait()
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    print(f"{config.model.name}: {total:,} parameters, {height} x {width} x {network.channels},", end=" ")
    print(f"{len(source.class_names) or 'no'} classes, variance {config.diffusion.variance}, in {workdir}")
    for note in notes:
        print(f"note: {note}")
    if network.channels > 3 and latents is None:
        print("It draws latents; for pictures give sample --vae=DIR, a diffusers VAE, or import with --config.data.vae=DIR")
    print(f"Next  python -m speedit_jax.sample --workdir={workdir} --num_images=16")


# Export


def export_weights(workdir: Path, to: str) -> None:
    out = Path(to).expanduser()
    directory = to.endswith("/") or not out.suffix
    if not directory and out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--to={to}: must end in .pt, .safetensors, or / for a diffusers directory")
    if out.exists():
        raise UserError(f"--to={to} exists; remove it, or name another")
    if out.suffix == ".pt":
        files.need_torch()
    checkpoints = Checkpoints(workdir)
    step = checkpoints.choose(_CHECKPOINT_STEP.value)
    meta = checkpoints.meta(step)
    config = complete(meta["config"])
    if config.model.qk_norm:
        raise UserError(f"{workdir} was trained with model.qk_norm, which no published format has a place for")
    mesh = one_device()
    model = assembly.make_model(config, mesh, meta["image_shape"], len(meta["class_names"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    backbone, _, patch = parse_name(config.model.name)
    state_shapes = table(backbone).shapes(shapes, patch)
    network = network_of(config, model, state_shapes)
    diffusion = assembly.make_diffusion(config)
    prediction = diffusion.prediction
    if directory:
        refuse_diffusers(model, network, prediction)
        autoencoder = open_autoencoder(_VAE.value, meta.get("latents"), network.channels, mesh)

    params = checkpoints.restore_weights(step, _WEIGHTS.value, shapes, sharding.param_shardings(mesh, model.axes, shapes))
    state = table(backbone).to_torch(jax.device_get(params), patch)
    height, width, _ = model.image_shape
    if directory:
        label = diffusers_label(config, mesh, model, params)
        origin = f"{_WEIGHTS.value} weights of step {step} of {workdir.name}"
        alone = no_pipeline(autoencoder)
        parts = dit.diffusers_config(network), dit.to_diffusers(state), f"DiT, {origin}.\n\n{label}\n"
        around = None if alone else autoencoder.directory, diffusion.schedule.betas, meta["class_names"]
        files.write_new(out, lambda partial: pipeline.write(partial, *parts, *around))
        print(label)
        print(f"note: the transformer alone: {alone}" if alone else "A DiTPipeline: transformer, autoencoder and DDIM's schedule")
    else:
        positions = sincos_position_table(height // patch, width // patch, model.width).astype(np.float32)
        state = {COMPUTED: positions[None], **state}
        state = dig.with_aliases(state) if backbone == "DiG" else state
        write = files.write_pt if out.suffix == ".pt" else files.write_safetensors
        files.write_new(out, lambda partial: write(partial, state))
        for note in dig_notes(config, network.depth, (height, width)):
            print(f"note: {note}")
        if prediction != "epsilon":
            print(f"note: it predicts {prediction}, which the file does not say and published samplers do not expect")
    print(f"{_WEIGHTS.value} weights of step {step} in {out}")


def network_of(config: ml_collections.ConfigDict, model: Model, state_shapes: Mapping[str, tuple[int, ...]]) -> Network:
    """What the exported tensors will say of themselves, and the heads."""
    height, width, _ = model.image_shape
    # Scalars that pretend to be large: only their shapes are looked at.
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in state_shapes.items()}
    network = (dig if dig.is_dig(state) else dit).describe(state)
    tokens = height * width // network.patch**2
    return dataclasses.replace(network, heads=model.heads, tokens=tokens)


# Both ways


def table(backbone: str) -> Table:
    return {"DiT": dit.TABLE, "DiG": dig.TABLE}[backbone]


def one_device() -> Mesh:
    """Whatever the run was sharded by."""
    devices = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).devices
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, list(devices.flat[:1]))


def dig_notes(config: ml_collections.ConfigDict, depth: int, image: tuple[int, int]) -> list[str]:
    backbone, directions = parse_name(config.model.name)[0], config.model.directions
    if backbone != "DiG" or (depth % directions == 0 and image[0] == image[1]):
        return []
    return [
        f"the published DiG leaves its tokens turned unless the image is square and the depth a multiple of {directions}: with"
        f" a depth of {depth} and {image[0]} x {image[1]} its outputs are not ours"
    ]


def convert() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; it is what --from makes, or what --to exports")
    if bool(_FROM.value) == bool(_TO.value):
        raise UserError("give one of --from=FILE (import) and --to=FILE (export)")
    workdir = Path(_WORKDIR.value).expanduser()
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError("--config: cannot be read, or its get_config() does not return a ConfigDict")
    given = config_flags.get_override_values(flags.FLAGS["config"])
    if _FROM.value:
        if _VAE.value:
            raise UserError("--vae goes with --to; an import is told its autoencoder by --config.data.vae=DIR")
        import_weights(Path(_FROM.value).expanduser(), workdir, given)
        return
    if given:
        raise UserError(f"--config.{next(iter(given))} goes with --from: a run has its own config")
    export_weights(workdir, _TO.value)


if __name__ == "__main__":
    if not any(argument.startswith("--config=") for argument in sys.argv):
        # As the flag's default it would be read before a mistake in --config.KEY can be told in one line.
        sys.argv.insert(1, f"--config={Path(__file__).with_name('config.py')}")
    cli.run(convert)
