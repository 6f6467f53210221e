"""Checks of a config's numbers, before anything is opened or compiled."""

import math

import ml_collections
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.config import LARGEST_SEED, OF_BACKBONE, flatten, get_config
from speedit_jax.diffusion import regularizers
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import VARIANCES, GaussianDiffusion
from speedit_jax.diffusion.masks import KINDS
from speedit_jax.diffusion.strategies import Strategy
from speedit_jax.errors import UserError
from speedit_jax.models.align import HEADS
from speedit_jax.models.build import Model, parse_name

ALIGN_TARGETS = ("ema", "features")
_LARGEST = 2**31 - 1  # steps and sizes are int32 on the devices
_LEAST_EPS = 1e-37  # float32 flushes what is smaller to zero
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
    """Raises a UserError for a number that is not finite or out of range, or for a config that lacks keys."""
    values = flatten(config.to_dict())
    if missing := sorted(flatten(get_config().to_dict()).keys() - values.keys()):
        raise UserError(f"the config has no {missing[0]}; let its get_config() start from speedit_jax.config.get_config()")
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name}={number}: must be a finite number")
    for name, value in values.items():
        most = LARGEST_SEED if name in ("seed", "evaluation.seed") else _LARGEST
        if isinstance(value, int) and value > most:
            raise UserError(f"{name}={value}: must be at most {most}")
    for name, least in _LEAST.items():
        if values[name] < least:
            raise UserError(f"{name}={values[name]}: must be at least {least}")
    if config.data.mask and config.data.mask not in KINDS:
        raise UserError(f"unknown data.mask {config.data.mask!r}; choose one of {', '.join(KINDS)}, or none with an empty one")
    if not 0 <= config.data.mask_all < 1:
        raise UserError(f"data.mask_all={config.data.mask_all}: must lie in [0, 1)")
    # Of a flow only one of its values means anything, and a misspelt one would silently be another network.
    if config.diffusion.variance not in VARIANCES:
        raise UserError(f"unknown diffusion.variance {config.diffusion.variance!r}; choose one of {', '.join(VARIANCES)}")
    if config.training.profile_at >= config.training.num_steps:
        raise UserError(
            f"training.profile_at={config.training.profile_at}: must be below training.num_steps={config.training.num_steps}, or"
            " there is no step to trace; 0 traces none"
        )
    if config.optim.eps < _LEAST_EPS:
        raise UserError(f"optim.eps={config.optim.eps}: must be positive, or Adam divides 0 by 0 where a gradient is 0")
    for section, key in (("optim", "b1"), ("optim", "b2"), ("training", "ema_decay")):
        if not 0 <= config[section][key] < 1:
            raise UserError(f"{section}.{key}={config[section][key]}: must lie in [0, 1)")
    for decay in config.training.extra_ema_decays:
        if not isinstance(decay, float) or not 0 <= decay < 1:
            raise UserError(f"training.extra_ema_decays={config.training.extra_ema_decays}: must lie in [0, 1)")


def check_backbone(model: ml_collections.ConfigDict) -> None:
    """Raises a UserError for a key of the other backbone that is set: it would do nothing. `model` is the config's section."""
    backbone, defaults = parse_name(model.name)[0], get_config().model
    for other, keys in OF_BACKBONE.items():
        for key in keys:
            if other != backbone and model[key] != defaults[key]:
                raise UserError(f"model.{key}={model[key]} is for {other}, and {model.name} does not look at it; leave it out")


def check_regularizer(
    config: ml_collections.ConfigDict,
    model: Model,
    diffusion: GaussianDiffusion | FlowMatching,
    features: tuple[int, int, int] | None = None,
) -> None:
    """Raises a UserError for an added loss that this run cannot have; what is off is not looked at.

    Args:
      features: the shape of an image's features, (h, w, F); None without them.
    """
    of, training = config.regularizer, config.training
    for name in ("dispersive", "contrastive", "align"):
        if not 0 <= of[name] < (1 if name == "contrastive" else math.inf):
            raise UserError(f"regularizer.{name}={of[name]}: must be 0, for off, or a positive weight (contrastive: below 1)")
    if of.align:
        _check_alignment(of, model, features)
    elif features:
        raise UserError("data.features is set, but nothing uses it: set regularizer.align and regularizer.align_target=features")
    if of.contrastive and not isinstance(diffusion, FlowMatching):
        raise UserError(
            "regularizer.contrastive is for flows that predict the velocity: with epsilon it would only scale the prediction, and"
            " samplers would fail; set diffusion.path=linear or gvp"
        )
    if of.contrastive and diffusion.predicts_x0:
        raise UserError(
            "regularizer.contrastive is for flows that predict the velocity, and this one predicts the image; set"
            " diffusion.prediction=epsilon, which of a flow is the velocity"
        )
    if of.contrastive and training.batch_size < 2:
        raise UserError("regularizer.contrastive wants another example in each batch: set training.batch_size to 2 or more")
    if not of.dispersive:
        return
    depth, group, (first, last) = of.dispersive_depth, of.dispersive_group, model.middle
    if model.blocks is None or not 1 <= depth <= model.blocks:
        raise UserError(f"regularizer.dispersive_depth={depth}: the model must be a DiT, and this must lie in 1..its depth")
    if not model.sees_all(depth):
        raise UserError(f"regularizer.dispersive_depth={depth}: blocks {first} to {last - 1} do not see all tokens (tokens.*)")
    if group < 2 or training.batch_size % (group * training.accumulation):
        raise UserError(
            f"regularizer.dispersive_group={group}: must be at least 2, and divide training.batch_size={training.batch_size}"
            f" over training.accumulation={training.accumulation}"
        )
    if of.dispersive_temperature <= 0:
        raise UserError(f"regularizer.dispersive_temperature={of.dispersive_temperature}: must be positive")


def _check_alignment(of: ml_collections.ConfigDict, model: Model, features: tuple[int, int, int] | None) -> None:
    if of.align_target not in ALIGN_TARGETS:
        raise UserError(f"unknown regularizer.align_target {of.align_target!r}; choose one of {', '.join(ALIGN_TARGETS)}")
    if of.align_loss not in regularizers.ALIGNMENTS:
        raise UserError(f"unknown regularizer.align_loss {of.align_loss!r}; choose one of {', '.join(regularizers.ALIGNMENTS)}")
    if of.align_until < 0:
        raise UserError(f"regularizer.align_until={of.align_until}: must be 0, for never, or a number of steps")
    if of.align_target == "features":
        return _check_features(of, model, features)
    if features:
        raise UserError("data.features is set, but regularizer.align_target=ema does not use it: set it to features")
    if of.align_head == "conv" or of.align_spatial_norm:
        raise UserError(
            f"regularizer.align_head={of.align_head}, align_spatial_norm={of.align_spatial_norm}: conv and this norm are for"
            " regularizer.align_target=features; the EMA network's states have a head of their own, and are taken as they are"
        )
    depth, teacher = of.align_depth, of.align_teacher_depth
    if model.blocks is None or not 1 <= depth <= teacher <= model.blocks:
        raise UserError(
            f"regularizer.align_depth={depth}, align_teacher_depth={teacher}: the model must be a DiT, and these must lie in"
            " 1..its depth, the teacher's not before the other"
        )
    if not 0 <= of.align_time_gap <= 1:
        raise UserError(f"regularizer.align_time_gap={of.align_time_gap}: must lie in 0..1, the whole schedule")


def _check_features(of: ml_collections.ConfigDict, model: Model, features: tuple[int, int, int] | None) -> None:
    if not features:
        raise UserError("regularizer.align_target=features wants data.features, a directory that speedit_jax.features wrote")
    (first, last), depth, head = model.middle, of.align_depth, of.align_head
    if model.blocks is None or not 1 <= depth <= model.blocks:
        raise UserError(f"regularizer.align_depth={depth}: the model must be a DiT, and this must lie in 1..its depth")
    if head not in HEADS:
        raise UserError(f"unknown regularizer.align_head {head!r}; choose one of {', '.join(HEADS)}")
    if head == "conv" and not model.sees_all(depth):
        raise UserError(
            f"regularizer.align_head=conv wants the whole grid of tokens, and blocks {first} to {last - 1} do not see it"
            f" (tokens.*); choose mlp, or another regularizer.align_depth than {depth}"
        )
    if any(side % tokens for side, tokens in zip(features[:2], model.grid, strict=True)):
        grids = ["x".join(map(str, grid)) for grid in (features[:2], model.grid)]
        raise UserError(
            f"data.features has a grid of {grids[0]}, and the network has {grids[1]} tokens: it must be the same, or a multiple;"
            f" run speedit_jax.features with --grid={model.grid[0]},{model.grid[1]}"
        )
    if of.align_spatial_norm < 0 or (of.align_spatial_norm and model.tokens < 2):
        raise UserError(f"regularizer.align_spatial_norm={of.align_spatial_norm}: must not be negative, and wants several tokens")


def check_probe(config: ml_collections.ConfigDict, strategy: Strategy, model: Model, mesh: Mesh) -> None:
    """Raises a UserError where the microbatches that a strategy measures are too small for a kernel that devices share."""
    devices, size = sharding.batch_devices(mesh), config.training.batch_size
    # XLA pads what it divides itself; GLA and the flash kernel are divided by hand.
    if not strategy.probe_every or not (model.blocks is None or model.mixer == "pallas"):
        return
    parts = 2 * strategy.bins
    if size // parts % devices:
        raise UserError(
            f"training.batch_size={size}: {strategy.name} measures microbatches of {size // parts}, which the {devices} devices"
            f" of mesh axes {' and '.join(sharding.BATCH_AXES)} do not divide; take a multiple of {parts * devices}"
        )


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError unless the batch divides over microbatches and devices."""
    training, devices = config.training, sharding.batch_devices(mesh)
    if training.batch_size % (training.accumulation * devices):
        raise UserError(
            f"training.batch_size={training.batch_size} is not a multiple of training.accumulation="
            f"{training.accumulation} times the {devices} devices of mesh axes {' and '.join(sharding.BATCH_AXES)}"
        )
