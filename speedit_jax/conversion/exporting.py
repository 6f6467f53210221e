"""A run's weights for other programs."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from speedit_jax import storage
from speedit_jax.conversion.diffusers import INSTEAD, NOT_DIFFUSERS, NULL_LABEL, diffusers_label, no_pipeline, refuse_diffusers
from speedit_jax.conversion.scheduler import PREDICTION_TYPES
from speedit_jax.conversion.tables import dig_notes, one_device, table
from speedit_jax.encoders.autoencoder import open_autoencoder
from speedit_jax.errors import UserError
from speedit_jax.interop import dig, dit, files, pipeline, pixart
from speedit_jax.interop.dit import Architecture
from speedit_jax.interop.layout import COMPUTED
from speedit_jax.interop.tensors import check_finite
from speedit_jax.models.build import parse_name
from speedit_jax.models.layers import sincos_position_table
from speedit_jax.training.run import Run, open_run


@dataclasses.dataclass(frozen=True)
class Exported:
    """What is to be written.

    Attributes:
      run: that they are of.
      network: what the tensors will say of themselves.
      params: its weights.
      state: the same under the published names, without the position table.
      origin: which weights they are, for people.
    """

    run: Run
    network: Architecture
    params: Mapping
    state: Mapping[str, np.ndarray]
    origin: str


def export_weights(workdir: Path, to: str, weights: str, checkpoint_step: str, vae: str | None) -> None:
    """Writes the weights of a run.

    Args:
      to: FILE.pt, FILE.safetensors, or DIR/ for diffusers.
      weights: ema, raw or ema_DECAY.
      checkpoint_step: newest, best or a number.
      vae: where the autoencoder is, of a run on latents; None: where it was in training.

    Raises:
      UserError: there are no such weights, they are not finite, or the format cannot hold them.
    """
    out = storage.path(to)
    directory = to.endswith("/") or not out.suffix
    if not directory and out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--to={to}: must end in .pt, .safetensors, or / for a diffusers directory")
    if out.exists():
        raise UserError(f"--to={to} exists; remove it, or name another")
    if out.suffix == ".pt":
        files.need_torch()
    run = open_run(workdir, checkpoint_step, one_device())
    if reason := unpublished(run):
        raise UserError(reason)
    if directory:
        network = network_of(run)
        refuse_diffusers(run.config, run.model, network)
        autoencoder, alone = None, "a PixArtAlphaPipeline also needs T5"
        if not run.model.text:
            autoencoder = open_autoencoder(vae, run.encoded_by, network.channels, run.mesh)
            alone = no_pipeline(autoencoder, run.class_names)
        refuse_prediction(run.diffusion.prediction, alone)
    exported = gather(run, weights)
    if directory:
        write_diffusers(out, exported, None if alone else autoencoder.directory, alone)
    else:
        write_file(out, exported)
    print(f"{weights} weights of step {run.step} in {out}")


def gather(run: Run, weights: str) -> Exported:
    """The weights of a run whose network a published format can store, as `unpublished` says.

    Raises:
      UserError: there are no such weights, or they are not finite.
    """
    params = run.restore(weights)
    backbone, _, patch = parse_name(run.config.model.name)
    state = table(backbone, text=run.model.text is not None).to_torch(jax.device_get(params), patch)
    refuse_infinite(state, run, weights)
    return Exported(run, network_of(run), params, state, f"{weights} weights of step {run.step} of {run.workdir.name}")


def refuse_infinite(state: Mapping[str, np.ndarray], run: Run, weights: str) -> None:
    """Raises a UserError that names a tensor with numbers that are not finite."""
    try:
        check_finite(state)
    except UserError as e:
        raise UserError(
            f"the {weights} weights of step {run.step} of {run.workdir}: {e}; an earlier --checkpoint_step may be whole"
        ) from e


def unpublished(run: Run) -> str:
    """Why no published format can store a run's network; "" if one can."""
    model, backbone = run.config.model, parse_name(run.config.model.name)[0]
    parts = {"qk_norm": model.qk_norm, "rope": model.rope, "patch_bottleneck": model.patch_bottleneck}
    parts |= {"mlp=swiglu": model.mlp == "swiglu", "norm=rms": backbone == "DiT" and model.norm == "rms"}
    used = [f"model.{part}" for part, on in parts.items() if on]
    if used:
        return f"{run.workdir} was trained with {' and '.join(used)}, which no published format can store"
    if run.model.hinted:
        return (
            "no published format holds the layer of a run with data.mask; for the network of whole images start a run from this"
            " one without it (init_from, data.mask empty), and export that"
        )
    if run.config.tokens.method == "sprint":
        return f"{run.workdir} was trained with tokens.method=sprint, whose mask token and fusion no published format can store"
    single = model.adaln == "single"
    if run.model.text and not (single and model.text == "cross" and backbone == "DiT"):
        return (
            "of networks with text, the published formats hold PixArt-alpha's alone: a DiT with model.text=cross and"
            " model.adaln=single"
        )
    if not run.model.text and (single or model.position_scale != 1):
        return "without text, no published format holds model.adaln=single or a model.position_scale other than 1"
    return ""


def refuse_prediction(prediction: str, alone: str) -> None:
    """Raises a UserError for what diffusers would take for something else.

    Args:
      alone: why there is no pipeline, whose scheduler says what is predicted; "" if there is.
    """
    if prediction == "epsilon" or (prediction in PREDICTION_TYPES and not alone):
        return
    why = f", which only a pipeline says, and {alone}" if prediction in PREDICTION_TYPES else ""
    raise UserError(f"{NOT_DIFFUSERS} it predicts {prediction}, not epsilon{why}; {INSTEAD}")


def write_diffusers(out: Path, exported: Exported, autoencoder: Path | None, alone: str) -> None:
    """A DiTPipeline's directory, or the transformer's where there is no autoencoder."""
    config, model, names = exported.run.config, exported.run.model, exported.run.class_names
    diffusion, network, state = exported.run.diffusion, exported.network, exported.state
    if model.text:
        label = "Exact: outputs agree to rounding."
        around, readme = pipeline.Surroundings(), f"PixArt, {exported.origin}.\n\n{label}\n"
        write = functools.partial(pipeline.write, config=pixart.diffusers_config(network), state=pixart.to_diffusers(state))
        storage.write_new(out, lambda partial: write(partial, readme=readme, around=around))
        print(label, f"note: only the transformer was written: {alone}", sep="\n")
        return
    label = diffusers_label(config, one_device(), model, exported.params)
    readme = f"DiT, {exported.origin}.\n\n{label}\n"
    if autoencoder and len(names) < NULL_LABEL:
        state = dit.with_padding(state, NULL_LABEL)
        network = dataclasses.replace(network, label_rows=NULL_LABEL + 1)
        readme += f"\nIts {len(names)} classes are 0..{len(names) - 1}; the others, to {NULL_LABEL}, are all the null label.\n"
    transformer = dit.diffusers_config(network)
    if not config.model.time_freq_shift:
        transformer |= {pipeline.SHIFT: 0}
    scheduler = pipeline.scheduler_config(
        diffusion.schedule.betas, PREDICTION_TYPES[diffusion.prediction], config.sampling.num_steps
    )
    around = pipeline.Surroundings(scheduler, dict(enumerate(names)), autoencoder)
    storage.write_new(out, lambda partial: pipeline.write(partial, transformer, dit.to_diffusers(state), readme, around))
    print(label)
    print(
        f"note: only the transformer was written: {alone}"
        if alone
        else "Wrote a DiTPipeline: transformer, autoencoder and DDIM scheduler"
    )


def write_file(out: Path, exported: Exported) -> None:
    """A .pt or .safetensors of the published names."""
    write = files.write_pt if out.suffix == ".pt" else files.write_safetensors
    storage.write_new(out, lambda partial: write(partial, file_state(exported)))
    height, width, _ = exported.run.model.image_shape
    for note in dig_notes(exported.run.config, exported.network.depth, (height, width)):
        print(f"note: {note}")
    prediction = exported.run.diffusion.prediction
    if prediction != "epsilon":
        print(f"note: the model predicts {prediction}; the file does not record this, and published samplers expect epsilon")


def file_state(exported: Exported) -> dict[str, np.ndarray]:
    """What a file of the published names holds: the weights and the position table."""
    height, width, _ = exported.run.model.image_shape
    network = exported.network
    positions = sincos_position_table(height // network.patch, width // network.patch, network.width, network.position_scale)
    state = {COMPUTED: positions.astype(np.float32)[None], **exported.state}
    return dig.with_aliases(state) if network.backbone == "DiG" else state


def network_of(run: Run) -> Architecture:
    """What the exported tensors will say of themselves, and the heads."""
    height, width, _ = run.model.image_shape
    backbone, _, patch = parse_name(run.config.model.name)
    shapes = table(backbone, text=run.model.text is not None).shapes(run.shapes, patch)
    # Scalars that pretend to be large: only their shapes are looked at.
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    network = (dig if dig.is_dig(state) else pixart if pixart.is_pixart(state) else dit).describe(state)
    tokens = height * width // network.patch**2
    return dataclasses.replace(network, heads=run.model.heads, tokens=tokens, position_scale=run.config.model.position_scale)
