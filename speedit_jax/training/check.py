"""Checks of a config's numbers, before anything is opened or compiled."""

import math

import ml_collections
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.config import LARGEST_SEED, flatten
from speedit_jax.errors import UserError

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
    "training.hang_after": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "sampling.grid_images": 1,
    "evaluation.every": 0,
    "evaluation.num_images": 2,
    "evaluation.batch_size": 1,
    "evaluation.seed": 0,
    "evaluation.loss_every": 0,
    "evaluation.loss_images": 1,
    "mesh.slices": 1,
}


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError for a number that is not finite or out of range."""
    values = flatten(config.to_dict())
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name}={number}: must be a finite number")
    for name in ("seed", "evaluation.seed"):
        if values[name] > LARGEST_SEED:
            raise UserError(f"{name}={values[name]}: must be at most {LARGEST_SEED}")
    for name, least in _LEAST.items():
        if values[name] < least:
            raise UserError(f"{name}={values[name]}: must be at least {least}")
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
