"""The training step, a pure function (state, batch, key) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.models.build import Model
from speedit_jax.training.autoencoder import latents_of
from speedit_jax.training.state import TrainState, learning_rate

# Named streams of a step's key; the numbers are part of the format of a run: never renumber them.
_STREAMS = {"timesteps": 0, "noise": 1, "label_dropout": 2, "posterior": 3}


def stream(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, _STREAMS[name])


def drop_labels(key: jax.Array, y: jax.Array, rate: float, null_label: int | None) -> jax.Array:
    """Replaces each label by the null label with probability `rate`, so that one network learns both (guidance)."""
    if null_label is None:
        return y
    return jnp.where(jax.random.bernoulli(key, rate, y.shape), null_label, y)


def ema_decay(decay: float, warmup: bool, step: jax.Array) -> jax.Array:
    """The decay at optimizer step `step` (from 0); warmed up it is min(decay, (1 + step) / (10 + step))."""
    if not warmup:
        return jnp.float32(decay)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)


def microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]. Row r goes to microbatch r mod count, so every device keeps its own rows."""
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def make_loss(model: Model, diffusion: GaussianDiffusion) -> Callable:
    """loss(params, {x0, noise, t, weight, y}) -> (scalar, (metrics, per_example [B])).

    loss = mean over the batch of weight * mse + vb; the metrics are the batch means of the unweighted terms.
    """
    model_steps = diffusion.schedule.model_steps

    def loss(params, batch):
        x_t = diffusion.q_sample(batch["x0"], batch["t"], batch["noise"])
        output = model.apply(params, x_t, jnp.asarray(model_steps)[batch["t"]], batch["y"])
        terms = diffusion.losses(output, batch["x0"], x_t, batch["t"], batch["noise"])
        per_example = batch["weight"] * terms["mse"] + terms.get("vb", 0.0)
        return per_example.mean(), ({name: value.mean() for name, value in terms.items()}, per_example)

    return loss


def make_gradient(loss: Callable, accumulation: int) -> Callable:
    """gradient(params, batch) -> (gradient, loss, metrics, per_example [B]), over `accumulation` microbatches in turn."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradient(params, batch):
        if accumulation == 1:
            (value, (metrics, per_example)), grads = value_and_grad(params, batch)
            return grads, value, metrics, per_example
        parts = jax.tree.map(lambda x: microbatches(x, accumulation), batch)

        def one(total, part):
            (value, (metrics, per_example)), grads = value_and_grad(params, part)
            return jax.tree.map(jnp.add, total, (grads, value, metrics)), per_example

        (value, (metrics, _)), grads = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, value, metrics))
        total, per_example = jax.lax.scan(one, zeros, parts)
        # per_example goes back into the order of the batch, which `microbatches` dealt out.
        return *jax.tree.map(lambda x: x / accumulation, total), per_example.swapaxes(0, 1).reshape(-1)

    return gradient


def make_train_step(
    model: Model,
    diffusion: GaussianDiffusion,
    strategy: Any,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    latents: dict[str, Any] | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of `config`, the whole config.

    The batch is {"image": [B, H, W, C] in [-1, 1], "label": [B] int}, or, given `latents`, the identity of an Autoencoder, its
    {"moments": [B, h, w, 2C], "label"}. The key is the run's and never changes: each step
    folds its number in, so any step can be computed again from the state before it.
    """
    gradient = make_gradient(make_loss(model, diffusion), config.training.accumulation)
    schedule = learning_rate(config)

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        x0 = latents_of(latents, stream(key, "posterior"), batch["moments"]) if latents else batch["image"]
        # Drawn for the whole batch before it is split: the dual draw's marginal must not depend on microbatches.
        t, weight = strategy.sample(stream(key, "timesteps"), x0.shape[0], state.step, state.timesteps)
        inputs = {
            "x0": x0,
            "noise": jax.random.normal(stream(key, "noise"), x0.shape, x0.dtype),
            "t": t,
            "weight": weight,
            "y": drop_labels(stream(key, "label_dropout"), batch["label"], config.model.label_dropout, model.null_label),
        }
        grads, loss, metrics, per_example = gradient(state.params, inputs)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)

        def average(ema, decay):
            decay = ema_decay(decay, config.training.ema_warmup, state.step)
            return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)

        ema = average(state.ema, config.training.ema_decay)
        extra_ema = {decay: average(old, float(decay)) for decay, old in state.extra_ema.items()}
        changed = (params, ema, extra_ema, opt, strategy.update(state.timesteps, t, per_example))
        kept = (state.params, state.ema, state.extra_ema, state.opt, state.timesteps)
        # A non-finite gradient must not reach the moments or the EMA, which would keep it for ever.
        params, ema, extra_ema, opt, timesteps = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        metrics |= {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step - state.skipped),
        }
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            ema=ema,
            extra_ema=extra_ema,
            opt=opt,
            timesteps=timesteps,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    return step
