"""The training step, a pure function (state, batch, key) -> (state, metrics)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from speedit_jax import sharding
from speedit_jax.diffusion import masks, regularizers
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion, mean_flat
from speedit_jax.models.align import Projector
from speedit_jax.models.build import Model
from speedit_jax.models.condition import Condition
from speedit_jax.models.masking import Interpolater
from speedit_jax.models.routing import Route, taken
from speedit_jax.training.inputs import make_draw, stream
from speedit_jax.training.state import TrainState, learning_rate


def ema_decay(decay: float, warmup: bool, step: jax.Array) -> jax.Array:
    """The decay at optimizer step `step` (from 0); warmed up it is min(decay, (1 + step) / (10 + step))."""
    if not warmup:
        return jnp.float32(decay)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)


def microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]. Row r goes to microbatch r mod count, so every device keeps its own rows."""
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def make_loss(
    model: Model,
    diffusion: GaussianDiffusion | FlowMatching,
    regularizer: ml_collections.ConfigDict | None = None,
    projector: Projector | None = None,
    interpolater: Interpolater | None = None,
) -> Callable:
    """loss(params, {x0, noise, t, weight, importance, y}) -> (scalar, {"mse", "loss" and, where there is one, "vb"}).

    With "order" and "inverse", of routing.Route, in the batch, some tokens skip the middle blocks, and with "dropped", bool [B],
    some images do. With "known", bool [B, H, W, 1], the network is told these parts of x0; the loss is that of the whole image
    all the same.
    These are each example's, [B], the loss by diffusion.objective; the scalar is the mean over the batch of importance * loss.
    What the config's section `regularizer` switches on is added to the scalar and not to the loss, which strategies learn from:
    "dispersive", "contrast" with the target of another example, "negative", in the batch, and, with `projector`, "align".
    That wants the head's parameters beside the network's, as params["align"], and either "features" in the batch or "teacher_t"
    and a third argument, the weights of the teacher; and, where it stops, "aligning" [B], 1 before that and 0 afterwards.
    With `interpolater` there is a second pass (MDT, arXiv 2303.14389), of the batch with what its "masked" replaces, in which
    the tokens of a route are masked. The scalar is then the mean of both passes' objectives, contrast included, and each
    example's "mse" of this pass is "masked_mse"; all else is of the first pass. That wants params["mask"].
    """
    dispersive, contrastive = (regularizer.dispersive, regularizer.contrastive) if regularizer else (0.0, 0.0)
    aligned = make_alignment(model, diffusion, regularizer, projector) if projector else None
    depths = {regularizer.dispersive_depth} if dispersive else set()
    taps = tuple(sorted(depths | {regularizer.align_depth} if aligned else depths))

    def one_pass(params, batch, taps=(), **options):
        """(scalar, terms, what the network is told, route, {depth: tokens} of the taps)."""
        x_t = diffusion.q_sample(batch["x0"], batch["t"], batch["noise"])
        route = Route(batch["order"], batch["inverse"], model.kept, model.cell) if "order" in batch else None
        told = {"hint": masks.hint(batch["x0"], batch["known"])} if "known" in batch else {}
        options |= told | ({"route": route} if route else {}) | ({"taps": taps} if taps else {})
        options |= {"dropped": batch["dropped"]} if "dropped" in batch else {}
        output = model.apply(params, x_t, diffusion.model_time(batch["t"]), batch["y"], **options)
        output, tapped = output if taps else (output, ())
        terms = diffusion.losses(output, batch["x0"], x_t, batch["t"], batch["noise"])
        terms["loss"] = diffusion.objective(terms, batch["weight"])
        value = (batch["importance"] * terms["loss"]).mean()
        if contrastive:
            terms["contrast"] = mean_flat((diffusion.split_output(output) - batch["negative"]) ** 2)
            value -= contrastive * (batch["importance"] * batch["weight"] * terms["contrast"]).mean()
        return value, terms, told, route, dict(zip(taps, tapped, strict=True))

    def loss(params, batch, teacher=None):
        value, terms, told, route, hidden = one_pass(params, batch, taps)
        if interpolater:
            fill = functools.partial(interpolater.apply, params["mask"])
            masked_value, masked, *_ = one_pass(params, batch | batch["masked"], fill=fill)
            value, terms["masked_mse"] = (value + masked_value) / 2, masked["mse"]
        if dispersive:
            group, temperature = regularizer.dispersive_group, regularizer.dispersive_temperature
            terms["dispersive"] = regularizers.dispersive(hidden[regularizer.dispersive_depth], group, temperature)
            value += dispersive * terms["dispersive"].mean()
        if aligned:
            terms["align"] = aligned(params["align"], hidden[regularizer.align_depth], batch, teacher, route, told)
            importance = batch["importance"] * batch["aligning"] if regularizer.align_until else batch["importance"]
            value += regularizer.align * (importance * terms["align"]).mean()
        return value, terms

    return loss


def make_alignment(
    model: Model, diffusion: GaussianDiffusion | FlowMatching, regularizer: ml_collections.ConfigDict, projector: Projector
) -> Callable:
    """alignment(head, hidden, batch, teacher, route, told) -> [B], with all tokens of an image that `hidden` has.

    The target is batch["features"] (REPA, arXiv 2410.06940), or what a teacher makes of the image (self-representation alignment,
    SRA, arXiv 2505.02831). The teacher sees the same images with the same noise, the same, perhaps dropped, conditions and the
    same known parts, `told`, but at the times batch["teacher_t"], and all tokens in all blocks.
    """

    def of_teacher(batch, teacher, told):
        t = batch["teacher_t"]
        x_t = diffusion.q_sample(batch["x0"], t, batch["noise"])
        taps = (regularizer.align_teacher_depth,)  # what comes after is not computed
        return model.apply(teacher, x_t, diffusion.model_time(t), batch["y"], taps=taps, **told)[1][0]

    def alignment(head, hidden, batch, teacher, route, told):
        if regularizer.align_target == "features":
            target = regularizers.of_grid(batch["features"], model.grid, regularizer.align_spatial_norm)
        else:
            target = of_teacher(batch, teacher, told)
        if route and not model.sees_all(regularizer.align_depth):
            target, _ = taken(target, route)
        return regularizers.alignment(projector.apply(head, hidden), target, regularizer.align_loss)

    return alignment


def make_gradient(loss: Callable, accumulation: int) -> Callable:
    """gradient(params, batch, ...) -> (gradient, loss, terms of each example), over `accumulation` microbatches in turn.

    Only the batch is cut; what `loss` takes further is given to each.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradient(params, batch, *further):
        if accumulation == 1:
            (value, terms), grads = value_and_grad(params, batch, *further)
            return grads, value, terms
        parts = jax.tree.map(lambda x: microbatches(x, accumulation), batch)

        def one(total, part):
            (value, terms), grads = value_and_grad(params, part, *further)
            return jax.tree.map(jnp.add, total, (grads, value)), terms

        (value, _), grads = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), *further)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, value))
        total, terms = jax.lax.scan(one, zeros, parts)
        # The terms go back into the order of the batch, which `microbatches` dealt out.
        terms = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), terms)
        return *jax.tree.map(lambda x: x / accumulation, total), terms

    return gradient


def gradient_variance(loss: Callable, params: Any, batch: dict[str, jax.Array], pairs: int) -> jax.Array:
    """The variance of one example's gradient, summed over the parameters, of each pair of microbatches in turn. [pairs]

    Microbatches 2 i and 2 i + 1, as `microbatches` deals them, are pair i. If a and b are the mean gradients of m examples each,
    m / 2 |a - b|^2 estimates it without bias, whatever their mean is.
    """
    parts = jax.tree.map(lambda x: microbatches(x, 2 * pairs), batch)
    parts = jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[1:]), parts)
    size = len(batch["t"]) // (2 * pairs)

    def one(_, pair):
        a, b = (jax.grad(loss, has_aux=True)(params, jax.tree.map(lambda x, i=i: x[i], pair))[0] for i in (0, 1))
        return None, size / 2 * optax.tree.norm(jax.tree.map(jnp.subtract, a, b), squared=True)

    return jax.lax.scan(one, None, parts)[1]


def by_quarter(t: jax.Array, num_steps: int, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means of the unweighted mse and of the weighted loss over the examples of each quarter of the schedule.

    Returns:
      {"mse_q1": t < num_steps / 4, ..., "mse_q4", "loss_q1", ..., "loss_q4"}; NaN where the batch has no such example.
    """
    inside = (4 * t // num_steps)[:, None] == jnp.arange(4)
    means = {}
    for name in ("mse", "loss"):
        sums = jnp.where(inside, terms[name][:, None], 0).sum(axis=0)
        means |= {f"{name}_q{q + 1}": mean for q, mean in enumerate(sums / inside.sum(axis=0))}
    return means


def make_train_step(
    model: Model,
    diffusion: GaussianDiffusion | FlowMatching,
    strategy: Any,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    encoded_by: dict[str, Any] | None = None,
    null_text: Condition | None = None,
    projector: Projector | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of `config`, the whole config.

    The batch is {"image": [B, H, W, C] in [-1, 1], "label": [B] int}, or, given `encoded_by`, the identity of an Autoencoder, its
    {"moments": [B, h, w, 2C], "label"}; of a model with text also {"text": {"tokens" [B, L, E], "length" [B]}}, whose null
    condition is `null_text`; to align with features also {"features": [B, h, w, F]}. `projector` is of alignment, where that is
    switched on. The key is the run's and never changes: each step folds its number in, so any step can be computed again from the
    state before it.
    """
    loss_of = make_loss(model, diffusion)  # what the probe measures: the objective alone
    more = config.regularizer.dispersive or config.regularizer.contrastive or projector or model.interpolater
    trained = make_loss(model, diffusion, config.regularizer, projector, model.interpolater) if more else loss_of
    gradient = make_gradient(trained, config.training.accumulation)
    self_aligned = projector is not None and config.regularizer.align_target == "ema"
    schedule = learning_rate(config)
    draw = make_draw(model, diffusion, strategy, config, encoded_by, null_text)

    def probe(timesteps, params, inputs, key):
        t, weight = strategy.probe(stream(key, "probe"), inputs["t"].shape[0])
        t, importance = diffusion.draw_time(stream(key, "time"), t), jnp.ones_like(weight)
        probed = inputs | {"t": t, "weight": weight, "importance": importance}
        return strategy.learn(timesteps, gradient_variance(loss_of, params, probed, strategy.bins))

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        t, inputs = draw(state, batch, key)
        variables, teacher = state.params | state.heads, (state.ema,) if self_aligned else ()
        grads, loss, terms = gradient(variables, inputs, *teacher)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        updates, opt = optimizer.update(grads, state.opt, variables)
        variables = optax.apply_updates(variables, updates)
        params, heads = ({name: variables[name] for name in old} for old in (state.params, state.heads))

        def average(ema, decay):
            decay = ema_decay(decay, config.training.ema_warmup, state.step)
            return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)

        ema = average(state.ema, config.training.ema_decay)
        extra_ema = {decay: average(old, float(decay)) for decay, old in state.extra_ema.items()}
        # Every device learns of the whole batch, so that each remembers the same.
        seen = (sharding.constrain(x, (None,)) for x in (t, terms["loss"]))
        timesteps = strategy.update(state.timesteps, *seen)
        if strategy.probe_every:
            due = state.step % strategy.probe_every == 0
            timesteps = jax.lax.cond(due, lambda s: probe(s, state.params, inputs, key), lambda s: s, timesteps)
        changed = (params, ema, extra_ema, opt, timesteps, heads)
        kept = (state.params, state.ema, state.extra_ema, state.opt, state.timesteps, state.heads)
        # A non-finite gradient must not reach the moments or the EMA, which would keep it for ever.
        params, ema, extra_ema, opt, timesteps, heads = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        metrics = {name: value.mean() for name, value in terms.items()} | by_quarter(t, diffusion.schedule.num_steps, terms)
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
            heads=heads,
        )
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    return step
