"""The lines that training prints before its first step and after its last."""

import math
import shlex
from pathlib import Path

import jax
import ml_collections
from clu import parameter_overview

from speedit_jax import sharding
from speedit_jax.data import classes
from speedit_jax.data.sources import Source
from speedit_jax.encoders.autoencoder import scale_warning
from speedit_jax.kernels.gla import GLA_PAYS_FROM
from speedit_jax.models.build import Model, parse_name
from speedit_jax.reporting.environment import HUGE_PAGES, huge_pages_left_out
from speedit_jax.training.assembly import Assembly
from speedit_jax.training.state import decays

_MUCH_LEFT = 0.01  # of the initial weights in an average at the end of training


def opening(parts: Assembly, source: Source) -> list[str]:
    """What is about to run."""
    config, model, mesh = parts.config, parts.model, parts.mesh
    lines = [
        f"data       {config.data.source}: {len(source):,} images {source.image_shape}",
        *(f"           {line}" for line in classes.describe(source)),
        f"model      {config.model.name}: {parameter_overview.count_parameters(parts.shapes.params):,} parameters,"
        f" {model.dtype} activations, {model.mixer} mixer, remat {config.model.remat}",
        f"           {model.tokens:,} tokens, {parts.step_flops / 1e9:,.3g} GFLOP per image and training step",
    ]
    if line := route_line(model):
        lines.append(f"tokens     {line}")
    if model.interpolater:
        extra = parameter_overview.count_parameters(parts.shapes.heads["mask"])
        lines.append(f"           the masked tokens are guessed by {extra:,} parameters that only training has")
    if parts.projector:
        of = config.regularizer
        target = f"block {of.align_teacher_depth} of the EMA network"
        if parts.features:
            target = f"features {'x'.join(map(str, parts.features))} of {source.features.identity['encoder']}"
        until = f", until step {of.align_until:,}" if of.align_until else ""
        lines.append(
            f"alignment  of block {of.align_depth} with {target}, through a head of"
            f" {parameter_overview.count_parameters(parts.shapes.heads['align']):,} parameters that only training has{until}"
        )
    if parse_name(config.model.name)[0] == "DiG" and model.tokens < GLA_PAYS_FROM:
        lines.append(
            f"           at {model.tokens} tokens DiT is at least as fast; GLA is faster from about {GLA_PAYS_FROM}"
            " tokens on (docs/gla.md)"
        )
    lines.append(f"timesteps  {parts.strategy.describe(config.training.batch_size)}")
    lines += [*decay_line(parts), *ema_line(config.training)]
    axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
    device = mesh.devices.flat[0]
    processes = len({d.process_index for d in mesh.devices.flat})
    lines.append(f"devices    {mesh.size} {device.device_kind}, {processes} processes: {axes}")
    if device.platform == "cpu" and huge_pages_left_out():
        lines.append(f"           faster with GLIBC_TUNABLES={HUGE_PAGES} before the command (docs/training.md)")
    if parts.texts:
        way = "cross-attention to its tokens" if config.model.text == "cross" else "pooled, added to the timestep"
        encoder, form = parts.texts.identity["encoder"], model.text
        lines.append(f"text       {encoder}, at most {form.length} tokens of {form.width}: {way}")
        if source.class_names:
            lines.append("           the classes of the data are not given to the network")
    if model.hinted:
        mask, share = config.data.mask, config.data.mask_all
        lines.append(
            f"masks      {mask}: the network is told what they leave of an image, and nothing of {share:.0%} of the images"
        )
    if parts.encoded_by:
        pictures = "" if parts.autoencoder else "; data.vae is not set, so image grids show the first three latent channels"
        how = "encoded at every step" if parts.online else "stored"
        lines.append(f"latents    {model.image_shape} of {parts.encoded_by['vae']}, {how}{pictures}")
        if not parts.online and (warning := scale_warning(source.header)):
            lines.append(f"           warning: {warning}")
    return lines


def route_line(model: Model) -> str:
    """Which tokens the middle blocks of a model see in training, and what a step costs, of one where all see all; else ""."""
    start, end = model.middle
    share = model.step_flops / (3 * model.forward_flops)
    line = f"blocks {start} to {end - 1} see {model.kept or 'all'} of {model.tokens} tokens: {share:.2f} of the FLOPs"
    if model.path_drop is not None:
        return f"{line}; fused with what the blocks before return, and dropped in {model.path_drop:.0%} of the images"
    if model.interpolater:
        return f"a second pass, in which {line}"
    return line if model.kept is not None else ""


def decay_line(parts: Assembly) -> list[str]:
    """What weight decay reaches, if there is any."""
    optim = parts.config.optim
    if not optim.weight_decay:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(parts.shapes.params)
    reached = sum(leaf.size for path, leaf in leaves if decays(optim.decay_mask, path))
    which = "all parameters" if optim.decay_mask == "all" else "matrices only"
    share = reached / sum(leaf.size for _, leaf in leaves)
    return [f"decay      {optim.weight_decay:g}, {which}: {reached:,} parameters, {share:.1%} (optim.decay_mask)"]


def ema_line(training: ml_collections.ConfigDict) -> list[str]:
    """A warning where the weights at the start would be much of an average at the end."""
    decays = (training.ema_decay, *training.extra_ema_decays)
    left = {decay: share_left(decay, training.ema_warmup, training.num_steps) for decay in decays}
    much = [f"{share:.0%} with decay {decay:g}" for decay, share in left.items() if share > _MUCH_LEFT]
    if not much:
        return []
    return [
        f"ema        warning: after {training.num_steps:,} steps the average holds {' and '.join(much)} of the initial weights;"
        " set training.ema_warmup=True or a smaller training.ema_decay"
    ]


def share_left(decay: float, warmup: bool, num_steps: int) -> float:
    """The share of the initial weights in an average after `num_steps` steps: the product of the decays of all steps."""
    # While the average warms up, its decays are (1 + s) / (10 + s), whose product telescopes: of the first n only nine are left.
    warm = min(num_steps, max(0, math.ceil((10 * decay - 1) / (1 - decay)))) if warmup else 0
    return math.prod(k / (warm + k) for k in range(1, 10)) * decay ** (num_steps - warm)


def closing(workdir: Path, model: Model, best: tuple[int, dict[str, float]] | None) -> list[str]:
    """What a complete run left behind, and the next command.

    Args:
      best: step and numbers of the best of the evaluated checkpoints.
    """
    at, picture = shlex.quote(str(workdir)), shlex.quote(f"{workdir}/new.png")
    lines = [
        f"\nCheckpoints      {workdir}/checkpoints",
        f"Metrics          {workdir}/metrics.jsonl, {workdir}/curves.png, tensorboard --logdir={at}/tensorboard",
        f"Samples          {workdir}/samples",
    ]
    if best:
        step, values = best
        lines.append(f"Best             step {step}, {spelled(values)}; sample it with --checkpoint_step=best")
    what = ' --prompt="TEXT"' if model.text else " --class_labels=0,1,2,3" if model.num_classes > 3 else ""
    return [
        *lines,
        f"Report           {workdir}/report.html; update it with python -m speedit_jax.report --workdir={at}",
        f"Next             python -m speedit_jax.sample --workdir={at}{what} --num_images=64 --out={picture}",
    ]


def spelled(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
