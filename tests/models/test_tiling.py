"""Tiles: where they lie, that they are blended as diffusers blends them, and how far a seam can show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.models.tiling import Span, spans, tiled

SIZES = [(8, 8), (9, 16), (19, 13), (5, 22), (24, 7)]  # in latent pixels, for tiles of 8


def blended(network, x, tile, scale_in, scale_out):
    """diffusers' rule as it is told: every tile blends with the finished one above it, then with the finished one on its left."""
    step, overlap = tile * 3 // 4, tile // 4 * scale_out
    height, width = (size // scale_in for size in x.shape[1:3])
    finished = {}
    out = np.zeros((height * scale_out, width * scale_out))
    for i in range(0, height, step):
        for j in range(0, width, step):
            rows, columns = (slice(scale_in * k, scale_in * (k + tile)) for k in (i, j))
            b = np.array(network(x[:, rows, columns]))[0, :, :, 0]
            for axis, neighbour in ((0, (i - step, j)), (1, (i, j - step))):
                if neighbour in finished:
                    a, b = np.moveaxis(finished[neighbour], axis, 0), np.moveaxis(b, axis, 0)
                    extent = min(len(a), len(b), overlap)
                    ramp = np.arange(extent)[:, None] / extent
                    b[:extent] = a[-extent:] * (1 - ramp) + b[:extent] * ramp
                    b = np.moveaxis(b, 0, axis)
            finished[i, j] = b
            keep = b[: step * scale_out, : step * scale_out]
            out[i * scale_out :, j * scale_out :][: keep.shape[0], : keep.shape[1]] = keep
    return out


def own_value(scale_in, scale_out):
    """A network with nothing in common between tiles: the tile's mean everywhere, plus the pixel's own value."""

    def network(x):
        one = x[:, ::scale_in, ::scale_in]
        one = one + 10 * x.mean((1, 2, 3), keepdims=True)
        return one.repeat(scale_out, 1).repeat(scale_out, 2)

    return network


def image(height, width):
    return np.random.default_rng(0).standard_normal((1, height, width, 1), np.float32)


def test_spans():
    assert spans(19, 8) == [Span(0, 8, 0, 2), Span(6, 8, 2, 2), Span(12, 7, 2, 1), Span(18, 1, 1, 0)]
    assert spans(14, 8) == [Span(0, 8, 0, 2), Span(6, 8, 2, 2), Span(12, 2, 2, 0)]
    assert spans(5, 8) == [Span(0, 5, 0, 0)]


@pytest.mark.parametrize("scale_in, scale_out", [(1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_blends_as_diffusers_does(size, scale_in, scale_out):
    x = image(size[0] * scale_in, size[1] * scale_in)
    network = own_value(scale_in, scale_out)
    out = jax.jit(lambda x: tiled(network, x, 8, scale_in, scale_out))(x)
    expected = blended(network, x, 8, scale_in, scale_out)
    # A sum of four products: some roundings of float32.
    np.testing.assert_allclose(np.asarray(out)[0, :, :, 0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("size", SIZES)
def test_no_seam_where_tiles_agree(size):
    x = image(*size)
    np.testing.assert_allclose(jax.jit(lambda x: tiled(lambda x: x, x, 8, 1, 1))(x), x, rtol=0, atol=1e-6)


def test_a_seam_is_a_quarter_of_the_tiles_difference_at_most():
    """The module's promise: tiles that differ by one, each constant, give neighbouring pixels that differ by 1/4 at most."""
    # Random tiles, and the worst case by hand: black and white in turn along a row, and so the same in every row.
    x = np.random.default_rng(1).uniform(size=(21, 20, 26, 1)).astype(np.float32)
    x[-1] = (np.arange(26) // 6 % 2)[:, None]

    def corner(x):
        return jnp.broadcast_to(x[:, :1, :1], (len(x), 8 * x.shape[1], 8 * x.shape[2], 1))

    out = np.asarray(jax.jit(lambda x: tiled(corner, x, 8, 1, 8))(x))
    steps = [max(np.abs(np.diff(image, axis=axis)).max() for axis in (0, 1)) for image in out]
    assert max(steps) <= 0.25
    assert steps[-1] == pytest.approx(0.25)
