"""The train state and the optimizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.errors import UserError
from speedit_jax.models.align import Projector
from speedit_jax.models.build import Model

LEARNING_RATE_SCHEDULES = ("constant", "cosine")
DECAY_MASKS = ("auto", "matrices", "all")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training carries from step to step, and all that a checkpoint holds. Nothing in it is random.

    Attributes:
      step: [] int32, optimizer steps taken.
      params: the network's parameters.
      ema: their exponential moving average.
      extra_ema: decay, as text -> an average with that decay.
      opt: the optimizer's state.
      timesteps: the timestep strategy's state.
      heads: parameters that only training uses, beside the network's and without an average: {} or with "align", Projector's, and
        "mask", Interpolater's.
      skipped: [] int32, steps whose gradient was not finite and that changed nothing.
      skipped_in_a_row: [] int32.
    """

    step: jax.Array
    params: Any
    ema: Any
    extra_ema: dict[str, Any]
    opt: Any
    timesteps: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    heads: dict[str, Any] = dataclasses.field(default_factory=dict)


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero at training.num_steps. `config` is the whole config.

    Raises:
      UserError: unknown schedule, or a warm-up longer than the run.
    """
    optim, num_steps = config.optim, config.training.num_steps
    if optim.schedule not in LEARNING_RATE_SCHEDULES:
        raise UserError(f"unknown optim.schedule {optim.schedule!r}; choose one of {', '.join(LEARNING_RATE_SCHEDULES)}")
    if optim.warmup_steps >= num_steps:
        raise UserError(f"optim.warmup_steps={optim.warmup_steps} must be below training.num_steps={num_steps}")
    if optim.schedule == "cosine":
        main = optax.cosine_decay_schedule(optim.learning_rate, num_steps - optim.warmup_steps)
    else:
        main = optax.constant_schedule(optim.learning_rate)
    if not optim.warmup_steps:
        return main
    # From lr / n rather than 0, so that the first step counts.
    start = optim.learning_rate / optim.warmup_steps
    warmup = optax.linear_schedule(start, optim.learning_rate, optim.warmup_steps)
    return optax.join_schedules([warmup, main], [optim.warmup_steps])


def decays(mask: str, path: tuple[Any, ...]) -> bool:
    """Whether weight decay reaches the parameter at `path`, as jax.tree_util gives it.

    Kernels are matrices, but for DiG's filters and SPRINT's fusion: those act on the residual stream itself and start as the
    identity.
    """
    names = [part.key for part in path]
    return mask == "all" or (names[-1] == "kernel" and "conv" not in names and names[0] != "sprint")


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on a clipped gradient; `config` is the whole config.

    Raises:
      UserError: unknown schedule or mask.
    """
    optim = config.optim
    if optim.decay_mask not in DECAY_MASKS:
        raise UserError(f"unknown optim.decay_mask {optim.decay_mask!r}; choose one of {', '.join(DECAY_MASKS)}")

    def decay(updates, params):
        def one(path, update, param):
            return update + optim.weight_decay * param if decays(optim.decay_mask, path) else update

        return jax.tree_util.tree_map_with_path(one, updates, params)

    # As optax.adamw, whose own mask gives the state another form: a run could not go on with another mask.
    adamw = optax.chain(
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.stateless(decay) if optim.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    if not optim.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


_HEADS, _MASK = 1, 2  # folded into the key of the initial weights for those of the heads


def initial_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    strategy: Any,
    key: jax.Array,
    extra_ema_decays: Sequence[float] = (),
    projector: Projector | None = None,
) -> TrainState:
    """The state before the first step: a pure function of the key, the same on every mesh."""
    params = model.init(key)
    heads = {"align": projector.init(jax.random.fold_in(key, _HEADS))} if projector else {}
    if model.interpolater:
        heads["mask"] = model.interpolater.init(jax.random.fold_in(key, _MASK))
    zero = jnp.zeros((), jnp.int32)
    # The copies keep params and averages from sharing a buffer, which donation would free twice.
    ema, *extra = (jax.tree.map(jnp.copy, params) for _ in range(1 + len(extra_ema_decays)))
    extra = dict(zip(map(str, extra_ema_decays), extra, strict=True))
    opt = optimizer.init(params | heads)
    return TrainState(zero, params, ema, extra, opt, strategy.init(), zero, jnp.copy(zero), heads)


def state_shardings(
    mesh: Mesh,
    model: Model,
    optimizer: optax.GradientTransformation,
    strategy: Any,
    extra_ema_decays: Sequence[float] = (),
    projector: Projector | None = None,
) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state on `mesh`; the optimizer's moments are sharded as their parameters are."""
    shapes = jax.eval_shape(
        lambda key: initial_state(model, optimizer, strategy, key, extra_ema_decays, projector), jax.random.key(0)
    )
    params = sharding.param_shardings(mesh, model.axes, shapes.params)
    heads = {"align": sharding.param_shardings(mesh, projector.axes, shapes.heads["align"])} if projector else {}
    if model.interpolater:
        heads["mask"] = sharding.param_shardings(mesh, model.interpolater.axes, shapes.heads["mask"])
    everywhere = sharding.replicated(mesh)
    opt = optax.tree.map_params(optimizer, lambda _, s: s, shapes.opt, params | heads, transform_non_params=lambda _: everywhere)
    return shapes, TrainState(
        step=everywhere,
        params=params,
        ema=params,
        extra_ema=dict.fromkeys(shapes.extra_ema, params),
        opt=opt,
        timesteps=jax.tree.map(lambda _: everywhere, shapes.timesteps),
        skipped=everywhere,
        skipped_in_a_row=everywhere,
        heads=heads,
    )
