"""Steps that were skipped because something was not finite: what it was, the batch or the gradient."""

import collections
from typing import Any

import jax
import jax.numpy as jnp

from speedit_jax import sharding
from speedit_jax.errors import UserError
from speedit_jax.training.assembly import Assembly


class Skips:
    """What the skipped steps of a run owe to its data, and what to its gradients.

    A batch is looked at on the devices, next to the step and not within it; the answer is read only where steps were skipped.

    Args:
      skipped: steps that were skipped before this start.
    """

    def __init__(self, parts: Assembly, skipped: int):
        training = parts.config.training
        self._data, self._limit, self._mesh = parts.config.data, training.max_skipped_in_a_row, parts.mesh
        self._earlier, self._skipped, self._step = skipped, skipped, 0
        self._batches = self._gradients = 0
        # Metrics come one log late.
        self._looked: collections.deque[tuple[int, jax.Array]] = collections.deque(maxlen=self._limit + 2 * training.log_every)
        everywhere = sharding.replicated(parts.mesh)
        self._finite = jax.jit(lambda batch: jnp.isfinite(batch).all(), out_shardings=everywhere)

    def look(self, step: int, batch: dict[str, jax.Array]) -> None:
        """Call with the batch that made step number `step` (from 1)."""
        (values,) = (batch[name] for name in ("image", "moments") if name in batch)
        with jax.set_mesh(self._mesh):
            self._looked.append((step, self._finite(values)))

    def check(self, written: dict[str, Any] | None) -> str | None:
        """Call with the metrics of a step, when they are read.

        Returns:
          A warning when the first steps are skipped.

        Raises:
          UserError: too many were skipped in a row; it names what was not finite.
        """
        if not written or written["skipped"] <= self._skipped:
            return None
        step, new = int(written["step"]), int(written["skipped"]) - self._skipped
        bad = [looked for looked, finite in self._looked if looked <= step and not finite]
        first = self._skipped == self._earlier
        batches = min(new, sum(looked > self._step for looked in bad))
        self._batches, self._gradients = self._batches + batches, self._gradients + new - batches
        self._skipped, self._step = int(written["skipped"]), step
        in_a_row = int(written["skipped_in_a_row"])
        if in_a_row >= self._limit:
            self._stop(step - in_a_row, in_a_row, sum(looked > step - in_a_row for looked in bad))
        if not first:
            return None
        return f"warning: {self._reasons()}; such a step changes nothing, and {self._limit} in a row end the run"

    def _stop(self, last_taken: int, in_a_row: int, bad: int) -> None:
        limit = f"(training.max_skipped_in_a_row={self._limit})"
        if bad:
            encoder = f" or the VAE {self._data.vae}" if self._data.vae else ""
            raise UserError(
                f"{bad} of the last {in_a_row} batches held numbers that are not finite {limit}: check the data"
                f" {self._data.source}{encoder}; the learning rate is not to blame"
            )
        # The weights are those of the last step that was taken: a lower rate alone would meet the same gradients.
        raise UserError(
            f"the last {in_a_row} gradients were not finite {limit}, though the batches were: the weights have diverged; remove"
            f" the checkpoints from step {last_taken} on, lower optim.learning_rate or set model.dtype=float32, and go on from an"
            " earlier one with --continue_with_changes, or without one start anew in another --workdir"
        )

    def _reasons(self) -> str:
        found = ((self._batches, "the batch"), (self._gradients, "the gradient"))
        return " and ".join(f"{_steps(count)} skipped because {what} was not finite" for count, what in found if count)

    def summary(self) -> str | None:
        """All that were skipped; None where none was."""
        if not self._skipped:
            return None
        earlier = f"{_steps(self._earlier)} skipped before this start" if self._earlier else ""
        return "; ".join(filter(None, (self._reasons(), earlier)))


def _steps(count: int) -> str:
    return f"{count} step{'s were' if count > 1 else ' was'}"
