"""DiG's names in the published PyTorch code.

That code turns the tokens between blocks, ours never: in turns of four, its convolutions see the plane turned by 180 degrees in
blocks 1 and 3 and transposed in 2 and 3, for which the kernels are turned here (docs/gla.md).
"""

from collections.abc import Mapping

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop import dit
from speedit_jax.interop.layout import Table

BLOCK_MODULES = {
    "adaLN": "adaLN_modulation.1",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention/q": "attn.q_proj",
    "attention/k": "attn.k_proj",
    "attention/v": "attn.v_proj",
    "attention/r": "attn.g_proj",
    "attention/gate_down": "attn.gk_proj.0",
    "attention/gate_up": "attn.gk_proj.1",
    "attention/out_norm": "attn.g_norm_swish_gate",
    "attention/out": "attn.o_proj",
    "mlp/up": "mlp.gate_proj",
    "mlp/down": "mlp.down_proj",
    "conv": "dw_conv",
}
# With RMS norms the published code registers each of them twice.
_ALIASES = {"attn_norm": "norm1", "mlp_norm": "norm2"}


def rearrange(module: str, parameter: str, position: int, value: np.ndarray) -> np.ndarray:
    """A convolution's kernel [3, 3, D] between the raster frame and that of the scan order of `position`; its own inverse."""
    if (module, parameter) != ("conv", "kernel"):
        return value
    value = value[::-1, ::-1] if position % 2 else value
    return value.swapaxes(0, 1) if position >= 2 else value


TABLE = Table(dit.MODULES, BLOCK_MODULES, rearrange)


def is_dig(state: Mapping[str, np.ndarray]) -> bool:
    return any(".attn.gk_proj." in name for name in state)


def without_aliases(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each tensor once.

    Raises:
      UserError: two names of one tensor hold unequal values.
    """
    kept = {}
    for name, value in state.items():
        module = name.split(".")[-2] if "." in name else ""
        if module not in _ALIASES:
            kept[name] = value
            continue
        same = name.replace(f".{module}.", f".{_ALIASES[module]}.")
        if same not in state or not np.array_equal(state[same], value):
            raise UserError(f"{name} is not {same}: in the published code they are the same norm")
    return kept


def with_aliases(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `without_aliases`."""
    aliases = {
        name.replace(f".{module}.", f".{alias}."): value
        for name, value in state.items()
        for alias, module in _ALIASES.items()
        if name.startswith("blocks.") and name.split(".")[2] == module
    }
    return {**state, **aliases}


def describe(state: Mapping[str, np.ndarray]) -> dit.Architecture:
    """The network of the published code's tensors; how many scan orders it has is not among them.

    Raises:
      UserError: a tensor that tells the rest is missing or has another number of axes.
    """
    shell = dit.describe_shell(state)
    (head,) = dit.shape_of(state, "blocks.0.attn.g_norm_swish_gate.weight", 1)
    return dit.Architecture(
        backbone="DiG",
        heads=shell["width"] // head,
        norm="rms" if "blocks.0.norm1.weight" in state else "layer",
        convolution="identity" if "blocks.0.dw_conv.weight" in state else "none",
        **shell,
    )
