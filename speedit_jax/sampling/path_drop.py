"""Path-drop guidance (SPRINT, arXiv 2510.21986): guided away from the prediction without condition and without middle blocks.

  (1)  v = v_u + w (v_c - v_u),   v_c = D(x, t, y),   v_u = D(x, t, null) with the mask token for all that the middle returns

The middle blocks run for v_c alone, so a guided step costs little more than half of one with two whole passes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from speedit_jax.errors import UserError
from speedit_jax.models.build import Model


def check_path_drop(model: Model, scale: float, guided: bool) -> None:
    """Raises a UserError for a model that has no such guidance.

    Args:
      scale: w.
      guided: whether there is another guide.
    """
    if model.path_drop is None:
        raise UserError("path_drop_guidance is for models that were trained with tokens.method=sprint")
    if not model.path_drop:
        raise UserError("path_drop_guidance: this model was trained with tokens.path_drop=0, so it needs its middle blocks")
    if not model.guidable:
        raise UserError("path_drop_guidance needs a model trained with classes or text and model.label_dropout > 0")
    if guided:
        raise UserError("path_drop_guidance: there is another guide already; choose one")
    if scale == 1:
        raise UserError("path_drop_guidance has no effect at guidance_scale=1; give another scale")


def without_middle(model: Model, params: Any, null: Any) -> Callable[..., jax.Array]:
    """(x, t, y) -> the network's output for the null condition, whatever y is, without its middle blocks: v_u of eq. (1)."""

    def apply(x, t, y):
        nulls = jax.tree.map(lambda rows, of_one: jnp.full_like(rows, of_one), y, null)
        return model.apply(params, x, t, nulls, dropped=True)

    return apply
