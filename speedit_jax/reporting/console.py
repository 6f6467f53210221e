"""The lines that training prints before its first step and after its last."""

from pathlib import Path

from clu import parameter_overview

from speedit_jax import sharding
from speedit_jax.data.sources import Source
from speedit_jax.kernels.gla import GLA_PAYS_FROM
from speedit_jax.models.build import Model, parse_name
from speedit_jax.reporting.environment import HUGE_PAGES, huge_pages_left_out
from speedit_jax.training.assembly import Assembly


def opening(parts: Assembly, source: Source) -> list[str]:
    """What is about to run."""
    config, model, mesh = parts.config, parts.model, parts.mesh
    classes = len(source.class_names)
    lines = [
        f"data       {config.data.source}: {len(source)} images {source.image_shape}, {classes or 'no'} classes",
        f"model      {config.model.name}: {parameter_overview.count_parameters(parts.shapes.params):,} parameters,"
        f" {model.dtype} activations, {model.mixer} mixer, remat {config.model.remat}",
        f"           {model.tokens:,} tokens, {3 * model.forward_flops / 1e9:,.3g} GFLOP an image and training step",
    ]
    if parse_name(config.model.name)[0] == "DiG" and model.tokens < GLA_PAYS_FROM:
        lines.append(
            f"           at {model.tokens} tokens DiT is as fast or faster; GLA pays from about {GLA_PAYS_FROM} on (docs/gla.md)"
        )
    lines.append(f"timesteps  {parts.strategy.describe(config.training.batch_size)}")
    axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
    device = mesh.devices.flat[0]
    processes = len({d.process_index for d in mesh.devices.flat})
    lines.append(f"devices    {mesh.size} {device.device_kind}, {processes} processes: {axes}")
    if device.platform == "cpu" and huge_pages_left_out():
        lines.append(f"           faster with GLIBC_TUNABLES={HUGE_PAGES} before the command (docs/training.md)")
    if parts.latents:
        pictures = "" if parts.autoencoder else "; pictures show three channels of latents, for data.vae names no autoencoder"
        how = "encoded at each step" if parts.online else "stored"
        lines.append(f"latents    {model.image_shape} of {parts.latents['vae']}, {how}{pictures}")
    return lines


def closing(workdir: Path, model: Model, best: tuple[int, dict[str, float]] | None) -> list[str]:
    """What a complete run left behind, and the next command.

    Args:
      best: step and numbers of the best of the evaluated checkpoints.
    """
    lines = [
        f"\nCheckpoints      {workdir}/checkpoints",
        f"Metrics          {workdir}/metrics.jsonl, {workdir}/curves.png, tensorboard --logdir={workdir}/tensorboard",
        f"Samples          {workdir}/samples",
    ]
    if best:
        step, values = best
        lines.append(f"Best             step {step}, {spelled(values)}; --checkpoint_step=best draws from it")
    labels = " --class_labels=0,1,2,3" if model.num_classes > 3 else ""
    return [
        *lines,
        f"All on one page  {workdir}/report.html; python -m speedit_jax.report --workdir={workdir} makes it again",
        f"Next             python -m speedit_jax.sample --workdir={workdir}{labels} --num_images=64 --out={workdir}/new.png",
    ]


def spelled(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
