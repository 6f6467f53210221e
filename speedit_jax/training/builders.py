"""From a whole config to its parts: the one place where config sections meet."""

from pathlib import Path

import ml_collections
from jax.sharding import Mesh

from speedit_jax.data.sources import Source
from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.flow_timesteps import make_flow_strategy
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.schedules import Schedule, make_schedule
from speedit_jax.diffusion.strategies import Strategy
from speedit_jax.diffusion.timesteps import make_strategy as _make_strategy
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model, build
from speedit_jax.training import sharding, wandb_board
from speedit_jax.training.autoencoder import Autoencoder


def _schedule(config: ml_collections.ConfigDict) -> Schedule:
    diffusion = config.diffusion
    return make_schedule(diffusion.schedule, diffusion.num_steps, diffusion.beta_start, diffusion.beta_end)


def make_diffusion(config: ml_collections.ConfigDict) -> GaussianDiffusion | FlowMatching:
    schedule, path = _schedule(config), config.diffusion.path
    if path in PATHS:
        if config.diffusion.loss != "mse":
            raise UserError(
                f"diffusion.loss={config.diffusion.loss}: a flow (diffusion.path={path}) has no variational bound; use mse"
            )
        return FlowMatching(path, config.diffusion.num_steps, config.diffusion.variance == "learned_range")
    if path != "vp":
        raise UserError(f"unknown diffusion.path {path!r}; choose one of vp, {', '.join(PATHS)}")
    return GaussianDiffusion(schedule, config.diffusion.variance, config.diffusion.prediction, config.diffusion.loss)


def make_strategy(config: ml_collections.ConfigDict, diffusion: GaussianDiffusion | FlowMatching) -> Strategy:
    if isinstance(diffusion, FlowMatching):
        return make_flow_strategy(diffusion, _schedule(config), config.training.batch_size, **config.timesteps)
    # The bound does not depend on what is predicted, so neither does its weight.
    prediction = "epsilon" if diffusion.bound_alone else diffusion.prediction
    return _make_strategy(diffusion.schedule, prediction=prediction, **config.timesteps)


def make_autoencoder(config: ml_collections.ConfigDict, source: Source, mesh: Mesh) -> Autoencoder | None:
    """What turns the source's images into latents, or latents into pictures; None where there is none.

    Raises:
      UserError: the autoencoder cannot be read, or is not that of the latents.
    """
    where = config.data.vae
    if source.latents and not where and Path(source.latents["vae"]).is_dir():
        where = source.latents["vae"]
    if (where or source.latents) and config.sampling.clip:
        raise UserError("sampling.clip=True would clip latents as if they were pixels; set it to False")
    if not where:
        return None
    autoencoder = Autoencoder(where, mesh)
    if source.latents:
        autoencoder.check(source.latents)
    return autoencoder


def make_model(config: ml_collections.ConfigDict, mesh: Mesh, image_shape, num_classes: int) -> Model:
    """The network, wired to the mesh.

    Raises:
      UserError: the heads do not divide over the mesh, or the parts do not fit each other.
    """
    model = build(
        config.model,
        image_shape=tuple(image_shape),
        num_classes=num_classes,
        learned_variance=config.diffusion.variance == "learned_range",
        platform=mesh.devices.flat[0].platform,
        constrain=sharding.constrain,
        batch_axes=sharding.BATCH_AXES,
        head_axis=sharding.HEAD_AXIS,
    )
    if model.heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor={mesh.shape['tensor']} does not divide the {model.heads} heads of {config.model.name}")
    return model


# The least value of each number that nothing else checks before it is used.
_LEAST = {
    "seed": 0,
    "data.height": 1,
    "data.width": 1,
    "data.channels": 1,
    "data.threads": 0,
    "data.max_broken": 0,
    "data.synthetic_size": 1,
    "data.synthetic_classes": 0,
    "optim.learning_rate": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "training.num_steps": 1,
    "training.batch_size": 1,
    "training.accumulation": 1,
    "training.log_every": 1,
    "training.sample_every": 0,
    "training.profile_at": 0,
    "training.profile_steps": 1,
    "training.max_skipped_in_a_row": 1,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "sampling.grid_images": 1,
    "evaluation.every": 0,
    "evaluation.num_images": 2,
    "evaluation.batch_size": 1,
    "evaluation.seed": 0,
}


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError for a number that is out of range."""
    for name, least in _LEAST.items():
        section, _, key = name.rpartition(".")
        value = (config[section] if section else config)[key]
        if not value >= least:
            raise UserError(f"{name}={value}: must be at least {least}")
    wandb_board.check(config.training.wandb_project)
    for section, key in (("optim", "b1"), ("optim", "b2"), ("training", "ema_decay")):
        if not 0 <= config[section][key] < 1:
            raise UserError(f"{section}.{key}={config[section][key]}: must lie in [0, 1)")
    for decay in config.training.extra_ema_decays:
        if not isinstance(decay, float) or not 0 <= decay < 1:
            raise UserError(f"training.extra_ema_decays={config.training.extra_ema_decays}: must lie in [0, 1)")


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError unless the batch divides over microbatches and devices."""
    training, devices = config.training, sharding.batch_devices(mesh)
    if training.batch_size % (training.accumulation * devices):
        raise UserError(
            f"training.batch_size={training.batch_size} is not a multiple of training.accumulation="
            f"{training.accumulation} times the {devices} devices of mesh axes {' and '.join(sharding.BATCH_AXES)}"
        )
