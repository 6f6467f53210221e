"""What an export to diffusers can hold of a run, and how exactly."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.interop.dit import Architecture
from speedit_jax.models.build import Model
from speedit_jax.training import assembly

NOT_DIFFUSERS, INSTEAD = "diffusers' DiT cannot hold this model:", "export to .pt or .safetensors instead"
NULL_LABEL = 1000  # of DiTPipeline, whatever the classes


def refuse_diffusers(config: ml_collections.ConfigDict, model: Model, network: Architecture) -> None:
    """Raises a UserError that names all that diffusers' DiT or PixArt does not have."""
    height, width, _ = model.image_shape
    reasons = {
        "its backbone is DiG": network.backbone != "DiT",
        "it has no null label": model.null_label is None and model.text is None,
        "its model.time_freq_shift is 1, and PixArt's is 0": model.text is not None and config.model.time_freq_shift == 1,
        f"it is a flow (diffusion.path={config.diffusion.path})": model.text is not None and config.diffusion.path != "vp",
        f"its images are {height} x {width}, not square": height != width,
        f"its model.mlp_ratio is {network.mlp_ratio:g}, not 4": network.mlp_ratio != 4,
    }
    if any(reasons.values()):
        why = "; ".join(reason for reason, applies in reasons.items() if applies)
        raise UserError(f"{NOT_DIFFUSERS} {why}; {INSTEAD}")


def diffusers_label(config: ml_collections.ConfigDict, mesh: Mesh, model: Model, params: Any) -> str:
    """Whether diffusers computes the same network."""
    if config.model.time_freq_shift == 1:
        return "Exact: model.time_freq_shift is 1, as in diffusers; outputs agree to rounding."
    shifted = config.copy_and_resolve_references()
    shifted.model.time_freq_shift = 1
    other = assembly.make_model(shifted, mesh, model.image_shape, model.num_classes)
    t = jnp.array([50, 250, 500, 999])
    x = jax.random.normal(jax.random.key(0), (len(t), *model.image_shape))
    y = jnp.arange(len(t)) % model.num_classes
    with jax.set_mesh(mesh):
        ours, theirs = (np.asarray(jax.jit(m.apply)(params, x, t, y), np.float64) for m in (model, other))
    norms, errors = (np.sqrt((a**2).sum((1, 2, 3))) for a in (ours, theirs - ours))
    errors = errors / np.maximum(norms, np.finfo(float).tiny)
    listed = ", ".join(f"{error:.1%} at t = {step}" for step, error in zip(t.tolist(), errors, strict=True))
    return (
        "Approximate: the weights were trained with model.time_freq_shift 0, and diffusers embeds timesteps with 1, which"
        f" changes the network's output by {listed} (relative L2 on noise)."
    )


def no_pipeline(autoencoder: Autoencoder | None, class_names: Sequence[str]) -> str:
    """Why no DiTPipeline can be made; "" if it can."""
    if autoencoder is None:
        return "a DiTPipeline needs the autoencoder of the latents, --vae=DIR"
    if autoencoder.identity["config"]["shift_factor"]:
        return "a DiTPipeline does not know the shift_factor of this autoencoder"
    if len(class_names) > NULL_LABEL:
        return f"a DiTPipeline takes {NULL_LABEL} for the null label, and this model has {len(class_names)} classes"
    return ""
