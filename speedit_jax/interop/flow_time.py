r"""Velocity networks whose time runs the other way, as in REPA and LFM: 1 is noise and 0 is data.

Theirs predicts w(x, r) = eps - x_0 (linear) at r = 1 - s, ours v(x, s) = -w(x, 1 - s). Both changes can be made in the weights:

  (1)  the last layer is negated
  (2)  the timestep's features cos(f r), sin(f r) are, since r = 1 - s,
         cos(f r) = cos f cos(f s) + sin f sin(f s)
         sin(f r) = sin f cos(f s) - cos f sin(f s)
       so that the first layer W = [W_c, W_s] on them becomes [W_c cos f + W_s sin f, W_c sin f - W_s cos f]
"""

from collections.abc import Mapping

import numpy as np

from speedit_jax.errors import UserError

_TIME, _LAST = "t_embedder.mlp.0.weight", "final_layer.linear"
_MAX_PERIOD = 10_000.0  # of the timestep's features, in all published codes


def turned(state: Mapping[str, np.ndarray], shift: int = 0) -> dict[str, np.ndarray]:
    """The published code's tensors of a network that computes -w(x, 1 - s); its own inverse, up to float32.

    Args:
      shift: model.time_freq_shift.

    Raises:
      UserError: a tensor that changes is missing.
    """
    for name in (_TIME, f"{_LAST}.weight", f"{_LAST}.bias"):
        if name not in state:
            raise UserError(f"missing {name}")
    weight = state[_TIME].astype(np.float64)
    half = weight.shape[1] // 2
    f = np.exp(-np.log(_MAX_PERIOD) * np.arange(half) / (half - shift))
    cosine, sine = weight[:, :half], weight[:, half:]
    time = np.concatenate([cosine * np.cos(f) + sine * np.sin(f), cosine * np.sin(f) - sine * np.cos(f)], axis=1)
    last = {f"{_LAST}.{parameter}": -state[f"{_LAST}.{parameter}"] for parameter in ("weight", "bias")}
    return {**state, _TIME: time.astype(np.float32), **last}
