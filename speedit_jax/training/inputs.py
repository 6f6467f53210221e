"""What a step draws for its batch: timesteps, noise, dropped conditions, and what routes, masks and added losses need."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from speedit_jax.diffusion import masks, regularizers
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.inverse import latent_mask
from speedit_jax.encoders.autoencoder import latents_of, pixels_of_latent
from speedit_jax.models.build import Model
from speedit_jax.models.condition import Condition, replaced
from speedit_jax.models.routing import draw_route
from speedit_jax.training.state import TrainState

# Named streams of a step's key; the numbers are part of the format of a run: never renumber them.
_STREAMS = {
    "timesteps": 0,
    "noise": 1,
    "label_dropout": 2,
    "posterior": 3,
    "time": 4,
    "probe": 5,
    "tokens": 6,
    "negatives": 7,
    "teacher_time": 8,
    "masked_noise": 9,
    "masked_labels": 10,
    "masks": 13,
    "path_drop": 15,
}


def stream(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, _STREAMS[name])


def drop_conditions(key: jax.Array, y: Condition, rate: float, null: Condition | None) -> Condition:
    """Replaces each label or text by the null condition with probability `rate`, so that one network learns both (guidance)."""
    if null is None:
        return y
    return replaced(y, null, jax.random.bernoulli(key, rate, jax.tree.leaves(y)[0].shape[:1]))


def known_parts(
    key: jax.Array, shape: tuple[int, ...], data: ml_collections.ConfigDict, encoded_by: dict[str, Any] | None
) -> jax.Array:
    """What the network is told of each example, bool [B, h, w, 1]; of latents as sampling does, from masks of their pixels.

    Args:
      shape: [B, h, w, C] of the examples.
      data: the config's section.
      encoded_by: as in `make_draw`.
    """
    count, *size, _ = shape
    ratio = pixels_of_latent(encoded_by) if encoded_by else 1
    known = masks.draw_known(key, count, (size[0] * ratio, size[1] * ratio), data.mask, data.mask_all)
    return latent_mask(known, size) if encoded_by else known


def make_draw(
    model: Model,
    diffusion: GaussianDiffusion | FlowMatching,
    strategy: Any,
    config: ml_collections.ConfigDict,
    encoded_by: dict[str, Any] | None,
    null_text: Condition | None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, Any]]]:
    """draw(state, batch, key) -> (t, inputs): the strategy's timesteps, [B] int, and what `step.make_loss` takes.

    All is drawn for the whole batch before it is split: the dual draw's marginal must not depend on microbatches.

    Args:
      encoded_by, null_text: as in `step.make_train_step`, which gives the batch, and the key of this step.
    """
    kind, null = ("text", null_text) if model.text else ("label", model.null_label)
    regularizer = config.regularizer

    def draw(state: TrainState, batch: dict[str, jax.Array], key: jax.Array):
        x0 = latents_of(encoded_by, stream(key, "posterior"), batch["moments"]) if encoded_by else batch["image"]
        t, weight, importance = strategy.sample(stream(key, "timesteps"), x0.shape[0], state.step, state.timesteps)
        inputs = {
            "x0": x0,
            "noise": jax.random.normal(stream(key, "noise"), x0.shape, x0.dtype),
            "t": diffusion.draw_time(stream(key, "time"), t),
            "weight": weight,
            "importance": importance,
            "y": drop_conditions(stream(key, "label_dropout"), batch[kind], config.model.label_dropout, null),
        }
        passes = [inputs]
        if model.interpolater:
            inputs["masked"] = {
                "noise": jax.random.normal(stream(key, "masked_noise"), x0.shape, x0.dtype),
                "y": drop_conditions(stream(key, "masked_labels"), batch[kind], config.model.label_dropout, null),
            }
            passes.append(inputs["masked"])
        if model.kept is not None:
            order, inverse = draw_route(stream(key, "tokens"), x0.shape[0], model.grid, model.kept, model.cell)
            passes[-1].update(order=order, inverse=inverse)
        if model.path_drop:
            inputs["dropped"] = jax.random.bernoulli(stream(key, "path_drop"), model.path_drop, (x0.shape[0],))
        if model.hinted:
            inputs["known"] = known_parts(stream(key, "masks"), x0.shape, config.data, encoded_by)
        if regularizer.contrastive:
            for one in passes:
                target = diffusion.target(x0, inputs["t"], one["noise"])
                one["negative"] = target[regularizers.negatives(stream(key, "negatives"), x0.shape[0])]
        if regularizer.align and regularizer.align_until:
            inputs["aligning"] = jnp.broadcast_to((state.step < regularizer.align_until).astype(importance.dtype), t.shape)
        if regularizer.align and regularizer.align_target == "features":
            inputs["features"] = batch["features"]
        elif regularizer.align:
            gap = regularizer.align_time_gap * jax.random.uniform(stream(key, "teacher_time"), t.shape)
            inputs["teacher_t"] = diffusion.less_noise(inputs["t"], gap)
        return t, inputs

    return draw
