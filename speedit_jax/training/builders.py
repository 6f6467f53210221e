"""From a whole config to its parts: the one place where config sections meet."""

import jax
import ml_collections
from jax.sharding import Mesh

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.timesteps import TableStrategy
from speedit_jax.diffusion.timesteps import make_strategy as _make_strategy
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model, build
from speedit_jax.training import sharding


def make_diffusion(config: ml_collections.ConfigDict) -> GaussianDiffusion:
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.num_steps)
    return GaussianDiffusion(schedule, config.diffusion.variance)


def make_strategy(config: ml_collections.ConfigDict, diffusion: GaussianDiffusion) -> TableStrategy:
    return _make_strategy(diffusion.schedule, **config.timesteps)


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
        platform=jax.default_backend(),
        constrain=sharding.constrain,
        batch_axes=sharding.BATCH_AXES,
        head_axis=sharding.HEAD_AXIS,
    )
    if model.heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor={mesh.shape['tensor']} does not divide the {model.heads} heads of {config.model.name}")
    return model


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError unless the batch divides over microbatches and devices."""
    training, devices = config.training, sharding.batch_devices(mesh)
    for name in ("num_steps", "batch_size", "accumulation", "log_every"):
        if training[name] < 1:
            raise UserError(f"training.{name}={training[name]}: must be at least 1")
    if not 0 <= training.ema_decay < 1:
        raise UserError(f"training.ema_decay={training.ema_decay}: must lie in [0, 1)")
    if config.checkpoint.every < 1 or config.checkpoint.keep_last < 1:
        raise UserError("checkpoint.every and checkpoint.keep_last must be at least 1")
    if training.batch_size % (training.accumulation * devices):
        raise UserError(
            f"training.batch_size={training.batch_size} is not a multiple of training.accumulation="
            f"{training.accumulation} times the {devices} devices of mesh axes {' and '.join(sharding.BATCH_AXES)}"
        )
