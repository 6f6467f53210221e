"""Floating-point operations of a network, by closed forms: XLA counts a loop over layers once, and no kernel at all."""

from typing import Any

import jax


def weights_flops(params: Any, tokens: int, text_tokens: int = 0) -> int:
    """Of one image through every weight matrix and filter, forward: 2 a weight and token.

    Args:
      params: arrays or their shapes; what conditions the tokens (timestep, adaLN) sees an image once.
      tokens: of the image.
      text_tokens: of its text, padding included; 1 where only their mean is embedded.
    """
    flops = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            seen = 1 if "timestep" in name or "adaLN" in name else tokens
            flops += 2 * leaf.size * (text_tokens if name.startswith("text/") or "cross/kv" in name else seen)
    return flops


def skipped_flops(backbone: str, params: Any, tokens: int, kept: int, blocks: int, form: tuple[int, int, int]) -> int:
    """Of one image, forward, that a route spares: `blocks` blocks see `kept` of its tokens, but for their filters.

    Args:
      params: of the network, or their shapes.
      form: width, depth and heads of the network.
    """
    width, depth, heads = form
    of_blocks = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[0].key.startswith(("blocks", "rest_")) and "conv" not in [key.key for key in path]
    }
    weights = (weights_flops(of_blocks, tokens) - weights_flops(of_blocks, kept)) // depth
    mixers = (mixer_flops(backbone, count, width, 1, heads) for count in (tokens, kept))
    return blocks * (weights + next(mixers) - next(mixers))


def mixer_flops(backbone: str, tokens: int, width: int, depth: int, heads: int) -> int:
    """Of one image through attention's two products (DiT), or through GLA's state, written and read at every token (DiG)."""
    if backbone == "DiT":
        return depth * 4 * tokens**2 * width
    dv = width // heads
    return depth * 4 * tokens * heads * (dv // 2) * dv


def cross_attention_flops(tokens: int, text_tokens: int, width: int, depth: int) -> int:
    """Of one image through the two products of its attention to the text."""
    return depth * 4 * tokens * text_tokens * width
