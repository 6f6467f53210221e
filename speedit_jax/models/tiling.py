"""A network on overlapping tiles of an image, one after the other, blended to one output: memory of one tile.

Tiles start every 3/4 of a side and overlap by 1/4; the last ones are cut by the border. Along one axis the overlap of two tiles
blends linearly, u = 0, 1/e, ..., (e-1)/e being the weight of the later one. Where four tiles meet

  out = (1 - w) [(1 - u^2) A + u^2 B] + w [(1 - u) C + u D]        A B upper left and right, C D lower; w vertical, u horizontal

The square is diffusers', whose lower tiles blend with upper ones that are blended horizontally already, and then again. Its price
is a step of at most (B - A) / 4 where such a corner begins; everywhere else neighbouring pixels' weights differ by 2/e at most.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Span(NamedTuple):
    """A tile along one axis, in latent pixels: its start, its length, and what the tiles before and after share of it."""

    start: int
    length: int
    before: int
    after: int


def spans(size: int, tile: int) -> list[Span]:
    """The tiles of an axis; `tile` is a multiple of four."""
    overlap = tile // 4
    starts = range(0, size, tile - overlap)
    shared = [0, *(min(overlap, size - start) for start in starts[1:]), 0]
    return [Span(start, min(tile, size - start), *shared[i : i + 2]) for i, start in enumerate(starts)]


def _ramps(span: Span, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight of a tile over the one before, and of the one after over it: each [length * scale]."""
    length, before, after = (scale * n for n in span[1:])
    rise, fall = np.ones(length), np.zeros(length)
    rise[:before] = np.arange(before) / max(1, before)
    fall[length - after :] = np.arange(after) / max(1, after)
    return rise, fall


def _rows(span: Span, scale: int) -> np.ndarray:
    """Vertical weights of the rows that no lower tile shares, and of those that one does: [2, length * scale]."""
    rise, fall = _ramps(span, scale)
    shared = np.arange(len(rise)) >= len(rise) - scale * span.after
    return np.stack([~shared, shared]) * rise * (1 - fall)


def _columns(span: Span, scale: int) -> np.ndarray:
    """Horizontal weights in the two kinds of rows: [2, length * scale]."""
    rise, fall = _ramps(span, scale)
    return np.stack([rise**power * (1 - fall**power) for power in (1, 2)])


def tiled(network: Callable, x: jax.Array, tile: int, scale_in: int, scale_out: int) -> jax.Array:
    """`network` on tiles of x.

    Args:
      network: [B, scale_in h, scale_in w, C] -> [B, scale_out h, scale_out w, D] for any h and w.
      x: [B, scale_in H, scale_in W, C].
      tile: largest h and w, a multiple of four.

    Returns:
      [B, scale_out H, scale_out W, D].
    """
    grid = [size // scale_in for size in x.shape[1:3]]
    # Tiles of one shape share one compiled loop: at most three lengths per axis, because the border cuts at most two tiles.
    by_length = [itertools.groupby(sorted(spans(size, tile), key=lambda s: -s.length), key=lambda s: s.length) for size in grid]
    rows, columns = ([(length, list(group)) for length, group in axis] for axis in by_length)
    canvas = None
    for (h, row_group), (w, column_group) in itertools.product(rows, columns):
        tiles = list(itertools.product(row_group, column_group))
        piece = (x.shape[0], h * scale_in, w * scale_in, x.shape[3])
        out = jax.eval_shape(network, jax.ShapeDtypeStruct(piece, x.dtype))
        if canvas is None:
            canvas = jnp.zeros((x.shape[0], grid[0] * scale_out, grid[1] * scale_out, out.shape[3]), out.dtype)

        def add(canvas, tile, piece=piece, out=out):
            (row, column), vertical, horizontal = tile
            result = network(jax.lax.dynamic_slice(x, (0, row * scale_in, column * scale_in, 0), piece))
            weight = (vertical[:, :, None] * horizontal[:, None, :]).sum(0)[:, :, None]
            at = (0, row * scale_out, column * scale_out, 0)
            blend = jax.lax.dynamic_slice(canvas, at, out.shape) + weight * result
            return jax.lax.dynamic_update_slice(canvas, blend, at), None

        tables = (
            (np.array([r.start for r, _ in tiles]), np.array([c.start for _, c in tiles])),
            np.stack([_rows(r, scale_out) for r, _ in tiles]).astype(out.dtype),
            np.stack([_columns(c, scale_out) for _, c in tiles]).astype(out.dtype),
        )
        canvas, _ = jax.lax.scan(add, canvas, tables)
    return canvas
