r"""How timesteps are drawn: from a fixed density, from one that changes over training, or from one that follows measurements.

A strategy is `init() -> s`, `sample(key, n, step, s) -> (t [n], weight [n], importance [n])`, `update(s, t, loss) -> s`; s lives
in the train state, replicated over the mesh, and in the checkpoints. An example's loss is importance * (weight * mse + vb), or
importance * weight * vb where the bound is trained alone: the weight is part of what is minimised; the importance is not, it
only takes back that t was not drawn uniformly, and is 1 where the density is part of what is minimised, too. n is the whole
optimizer batch, before accumulation and sharding.

A strategy with a `probe_every` other than 0 also wants to know of gradients. Every so many steps the step draws
`probe(key, n) -> (t [n], weight [n])`, measures, and tells it: `learn(s, variance) -> s`.

`marginal(n, step)` is the exact density [T] of a timestep picked at random from the n of that optimizer step, in float64;
`describe(n)` is one line for the log.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

State = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class TableStrategy:
    """A strategy given by a fixed density and fixed weights.

    Attributes:
      name: what the log calls it.
      density: [T] float64, sums to 1: the density the independent draws come from.
      weights: [T] float64.
      pivot: P of the dual draw, or None for independent draws only: of n timesteps n//2 + 1 are drawn, the rest are duals of
        the first of these.
    """

    name: str
    density: np.ndarray
    weights: np.ndarray
    pivot: int | None = None
    probe_every: ClassVar[int] = 0

    def init(self) -> State:
        """Nothing to remember: the empty pytree."""
        return ()

    def sample(self, key: jax.Array, n: int, step: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        del step, state
        drawn = n if self.pivot is None else n // 2 + 1
        t = _draw(key, drawn, jnp.asarray(self.density, jnp.float32))
        if self.pivot is not None:
            t = jnp.concatenate([t, jnp.asarray(self.dual)[t]])[:n]
        return t, _at(self.weights, t), jnp.ones(n)

    def update(self, state: State, t: jax.Array, loss: jax.Array) -> State:
        del t, loss
        return state

    @property
    def dual(self) -> np.ndarray:
        """P - t for t < P and t - P otherwise, for every t: an antithetic pairing about the pivot. [T] int"""
        t = np.arange(len(self.density))
        dual = np.where(t < self.pivot, self.pivot - t, t - self.pivot)
        # The published code steps out of the table when the pivot is T; the nearest step stands in.
        return dual.clip(max=len(self.density) - 1)

    def marginal(self, n: int, step: int = 0) -> np.ndarray:
        del step
        if self.pivot is None:
            return self.density
        drawn = min(n, n // 2 + 1)
        pushed = np.bincount(self.dual, weights=self.density, minlength=len(self.density))
        return (drawn * self.density + (n - drawn) * pushed) / n

    def describe(self, n: int) -> str:
        marginal = self.marginal(n)
        least = marginal.min()
        ratio = marginal.max() / least if least > 0 else np.inf  # a narrow density is 0 far from its middle
        line = f"{_moments(self.name, marginal, self.weights)}, density max/min={ratio:.4g}"
        if self.pivot is None:
            return line
        return f"{line}, dual draw about {self.pivot}, {marginal[self.pivot :].sum():.1%} of draws at t >= {self.pivot}"


@dataclasses.dataclass(frozen=True)
class CurriculumStrategy:
    """A density that goes from one to another in a straight line, and stays there.

    Attributes:
      name: what the log calls it.
      first: [T] float64, the density at optimizer step 0.
      last: [T] float64, the density from optimizer step `steps` on.
      steps: how many optimizer steps the way takes.
      weights: [T] float64.
    """

    name: str
    first: np.ndarray
    last: np.ndarray
    steps: int
    weights: np.ndarray
    probe_every: ClassVar[int] = 0

    def init(self) -> State:
        """Nothing to remember: the empty pytree."""
        return ()

    def sample(self, key: jax.Array, n: int, step: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        del state
        progress = jnp.minimum(step / self.steps, 1.0)
        first, last = jnp.asarray(self.first, jnp.float32), jnp.asarray(self.last, jnp.float32)
        t = _draw(key, n, (1 - progress) * first + progress * last)
        return t, _at(self.weights, t), jnp.ones(n)

    def update(self, state: State, t: jax.Array, loss: jax.Array) -> State:
        del t, loss
        return state

    def marginal(self, n: int, step: int = 0) -> np.ndarray:
        del n
        progress = min(step / self.steps, 1.0)
        return (1 - progress) * self.first + progress * self.last

    def describe(self, n: int) -> str:
        first, last = (_moments(self.name, self.marginal(n, step), self.weights) for step in (0, self.steps))
        return f"{first}; from step {self.steps} on {last.partition(', ')[2]}"


@dataclasses.dataclass(frozen=True)
class LossSecondMomentStrategy:
    """Timesteps in proportion to the root mean square of their latest losses: IDDPM's sampler (arXiv 2102.09672, section 3.3).

    p_t = (1 - u) r_t / sum r + u / T with r_t = sqrt(mean of the last H losses at t, squared), and the importance 1 / (T p_t),
    so that what is minimised is that of uniform draws. Until every timestep has H losses, p is uniform.
    Its state is {"losses": [T, H] float32, a ring buffer for each t; "count": [T] int32, losses ever seen}.

    Attributes:
      name: what the log calls it.
      weights: [T] float64.
      history: H.
      uniform: u, which keeps every timestep alive.
    """

    name: str
    weights: np.ndarray
    history: int = 10
    uniform: float = 0.001
    probe_every: ClassVar[int] = 0

    def init(self) -> State:
        num_steps = len(self.weights)
        return {"losses": jnp.zeros((num_steps, self.history)), "count": jnp.zeros(num_steps, jnp.int32)}

    def probabilities(self, state: State) -> jax.Array:
        """p_t. [T]"""
        rms = jnp.sqrt((state["losses"] ** 2).mean(axis=1))
        num_steps = len(self.weights)
        adapted = (1 - self.uniform) * rms / rms.sum() + self.uniform / num_steps
        return jnp.where((state["count"] >= self.history).all(), adapted, 1 / num_steps)

    def sample(self, key: jax.Array, n: int, step: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        del step
        p = self.probabilities(state)
        t = _draw(key, n, p)
        return t, _at(self.weights, t), 1 / (len(self.weights) * p[t])

    def update(self, state: State, t: jax.Array, loss: jax.Array) -> State:
        """The state after the losses [n] at t [n] of one batch, in the batch's order; the importance is no part of a loss."""
        order = jnp.argsort(t, stable=True)
        t, loss, place = t[order], loss[order], jnp.arange(len(t))
        before = place - jnp.searchsorted(t, t)  # of the same timestep in this batch
        after = jnp.searchsorted(t, t, side="right") - 1 - place
        slot = (state["count"][t] + before) % self.history
        # Of more than H of one timestep the last H count; the others are written past the buffer, that is nowhere.
        slot = jnp.where(after < self.history, slot, self.history)
        return {"losses": state["losses"].at[t, slot].set(loss, mode="drop"), "count": state["count"].at[t].add(1)}

    def marginal(self, n: int, step: int = 0) -> np.ndarray:
        """While it warms up; later it depends on the losses."""
        del n, step
        return np.full(len(self.weights), 1 / len(self.weights))

    def describe(self, n: int) -> str:
        uniform = _moments(self.name, self.marginal(n), self.weights)
        return f"{uniform}; once every timestep has {self.history} losses, in proportion to their root mean square"


@dataclasses.dataclass(frozen=True)
class GradientNoiseStrategy:
    """Timesteps in proportion to the standard deviation of their gradient.

    Where the mean gradient at each t is small beside its noise, no other density makes the gradient of a batch vary less.
    The schedule is cut into `bins` equal parts, and p_t = (1 - u) n_b / sum + u / T for t in part b, with n_b the square root of
    v_b, the variance of one example's gradient, summed over the parameters. The importance is 1 / (T p_t), so that what is
    minimised is that of uniform draws. v is an average of measurements in which older ones count less; before the first, p is
    uniform. Its state is {"variance": [bins] float32, the average not yet divided by the sum of its weights, 1 - decay^probes;
    "probes": [] int32}.

    Attributes:
      name: what the log calls it.
      weights: [T] float64.
      probe_every: optimizer steps between two measurements; the first one is at step 0.
      bins: how many parts.
      decay: of the average, a measurement.
      uniform: u; no importance is greater than 1 / u.
    """

    name: str
    weights: np.ndarray
    probe_every: int = 100
    bins: int = 8
    decay: float = 0.9
    uniform: float = 0.1

    @property
    def edges(self) -> np.ndarray:
        """The first timestep of each part, and T. [bins + 1] int"""
        return -(-np.arange(self.bins + 1) * len(self.weights) // self.bins)

    def init(self) -> State:
        return {"variance": jnp.zeros(self.bins), "probes": jnp.zeros((), jnp.int32)}

    def probabilities(self, state: State) -> jax.Array:
        """p_t. [T]"""
        widths, num_steps = np.diff(self.edges), len(self.weights)
        deviation = jnp.sqrt(state["variance"])  # the sum of the average's weights would cancel
        adapted = (1 - self.uniform) * deviation / (widths * deviation).sum() + self.uniform / num_steps
        p = jnp.where((state["probes"] > 0) & (deviation.sum() > 0), adapted, 1 / num_steps)
        return jnp.repeat(p, widths, total_repeat_length=num_steps)

    def sample(self, key: jax.Array, n: int, step: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        del step
        p = self.probabilities(state)
        t = _draw(key, n, p)
        return t, _at(self.weights, t), 1 / (len(self.weights) * p[t])

    def update(self, state: State, t: jax.Array, loss: jax.Array) -> State:
        del t, loss
        return state

    def probe(self, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        """(t [n], weight [n]) of a measurement: rows r, r + 2 bins, ... are of part (r mod 2 bins) // 2, uniform within it."""
        part = np.arange(n) % (2 * self.bins) // 2
        first, last = self.edges[part], self.edges[part + 1]
        t = jax.random.randint(key, (n,), first, last)
        return t, _at(self.weights, t)

    def learn(self, state: State, variance: jax.Array) -> State:
        """The state after a measurement [bins]; one that is not finite is forgotten."""
        finite = jnp.isfinite(variance).all()
        average = self.decay * state["variance"] + (1 - self.decay) * variance
        return {"variance": jnp.where(finite, average, state["variance"]), "probes": state["probes"] + finite}

    def marginal(self, n: int, step: int = 0) -> np.ndarray:
        """Before it has measured; later it depends on the gradients."""
        del n, step
        return np.full(len(self.weights), 1 / len(self.weights))

    def describe(self, n: int) -> str:
        uniform = _moments(self.name, self.marginal(n), self.weights)
        measured = f"measured in {self.bins} parts every {self.probe_every} steps"
        return f"{uniform}; in proportion to the standard deviation of the gradient, {measured}"


Strategy = TableStrategy | CurriculumStrategy | LossSecondMomentStrategy | GradientNoiseStrategy


def _draw(key: jax.Array, n: int, density: jax.Array) -> jax.Array:
    return jax.random.choice(key, len(density), (n,), p=density)


def _at(weights: np.ndarray, t: jax.Array) -> jax.Array:
    return jnp.asarray(weights, jnp.float32)[t]


def _moments(name: str, density: np.ndarray, weights: np.ndarray) -> str:
    t = np.arange(len(density))
    return f"{name}: T={len(density)}, E[t]={density @ t:.1f}, E[weight]={density @ weights:.4f}"
