"""Random masks: their law, and that nothing of what they hide is told."""

import jax
import numpy as np
import pytest
import tiny

from speedit_jax import sharding
from speedit_jax.diffusion.masks import KINDS, draw_known, hint

COUNT = 2000


def hidden(kind, size=(32, 48), all_hidden=0.0, seed=0):
    drawn = jax.jit(lambda key: draw_known(key, COUNT, size, kind, all_hidden))(jax.random.key(seed))
    assert drawn.shape == (COUNT, *size, 1) and drawn.dtype == bool
    return ~np.asarray(drawn)[..., 0]


@pytest.mark.parametrize("kind", KINDS)
def test_most_masks_hide_a_part_and_every_pixel_is_hidden_sometimes(kind):
    holes = hidden(kind)
    share = holes.mean(axis=(1, 2))
    assert ((share > 0) & (share < 1)).mean() > 0.97
    assert np.quantile(share, 0.1) < 0.15 and np.quantile(share, 0.9) > 0.3
    assert holes.mean(axis=0).min() > 0.05 and holes.mean(axis=0).max() < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_no_side(kind):
    """Mirrored and, in a square, turned masks have the same law: 4 standard errors of the mean difference."""
    square = hidden(kind, (16, 16), seed=1).astype(float)
    weights = np.linspace(-1, 1, 16)
    for lean in (square @ weights, square.transpose(0, 2, 1) @ weights):
        lean = lean.sum(axis=1)
        assert abs(lean.mean()) < 4 * lean.std() / COUNT**0.5


def test_boxes_are_boxes():
    """The hole or what is around it is a rectangle; a quarter of them, up to 4 standard errors, hide their outside."""

    def rectangle(of):
        rows, columns = of.any(axis=2), of.any(axis=1)
        return (of == rows[:, :, None] & columns[:, None]).all(axis=(1, 2))

    holes = hidden("boxes")
    partly = holes[holes.any(axis=(1, 2)) & ~holes.all(axis=(1, 2))]
    inside, outside = rectangle(partly), rectangle(~partly)
    assert (inside | outside).all()
    # A half of the image is a rectangle both ways.
    share = (outside & ~inside).sum() / (outside ^ inside).sum()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / (outside ^ inside).sum()) ** 0.5
    halves = partly[:, :, 24:].all(axis=(1, 2)) & ~partly[:, :, :12].any(axis=(1, 2))
    assert halves.mean() > 0.01, "a whole side is hidden often enough to learn to go on with an image"


def test_strokes_hang_together():
    """A stroke is one piece: flooding from one of its pixels finds all of them."""
    for hole in hidden("strokes", (24, 24))[:100]:
        reached = np.zeros((26, 26), bool)
        reached[tuple(np.argwhere(hole)[0] + 1)] = True
        for _ in range(24 * 24):
            grown = reached.copy()
            for axis in (0, 1):
                for step in (-1, 1):
                    grown |= np.roll(grown, step, axis)
            grown[1:-1, 1:-1] &= hole
            grown[[0, -1]] = grown[:, [0, -1]] = False
            if (grown == reached).all():
                break
            reached = grown
        assert (reached[1:-1, 1:-1] == hole).all()


def test_all_is_hidden_as_often_as_asked():
    whole = hidden("mixed", (8, 8), all_hidden=0.4).all(axis=(1, 2)).mean()
    otherwise = hidden("mixed", (8, 8)).all(axis=(1, 2)).mean()
    expected = 0.4 + 0.6 * otherwise
    assert abs(whole - expected) < 4 * (expected * (1 - expected) / COUNT) ** 0.5
    assert otherwise < 0.02


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_every_mesh_draws_the_same(shape):
    mesh, key = tiny.make_mesh(shape), jax.random.key(3)
    with jax.set_mesh(mesh):
        draw = jax.jit(lambda key: draw_known(key, 16, (8, 8), "mixed", 0.25), out_shardings=sharding.batch_sharding(mesh))
        tiny.assert_same(draw(key), draw_known(key, 16, (8, 8), "mixed", 0.25))


def test_the_hint_tells_what_is_known_and_nothing_else():
    rng = np.random.default_rng(0)
    known, image = rng.random((3, 8, 8, 1)) < 0.5, rng.normal(size=(3, 8, 8, 2)).astype(np.float32)
    told = np.asarray(hint(image, known))
    np.testing.assert_array_equal(told, np.concatenate([image * known, known], axis=-1))
    # Not even a NaN passes.
    tiny.assert_same(told, hint(np.where(known, image, np.nan), known))
    assert not np.asarray(hint(image, np.zeros_like(known))).any()
