r"""Known parts of images for a network that is told of them: what it sees, and the random masks that it is trained with.

m is 1 where the image x_0 is known. Beside x_t the network sees

  (1)  hint = [m x_0, m], C + 1 channels                                          as GLIDE's inpainting (arXiv 2112.10741)

Where nothing is known the hint is zero. A linear layer without bias that begins at zero takes it, so a network that has learned
to fill is, without a hint, the network of whole images with the same weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST, _LARGEST = 1 / 8, 1.0  # sides of a box, in sides of the image; half of the boxes go all across it one way
_INVERTED = 0.25  # share of boxes whose outside is hidden
_SEGMENTS = (4, 12)  # fewest and most of a stroke
_LONGEST = 0.4  # segment, in the shorter side of the image
_WIDTHS = (0.03, 0.2)  # half of a stroke's, in the same


def hint(image: jax.Array, known: jax.Array) -> jax.Array:
    """Eq. (1): image [B, H, W, C], known bool [B, H, W, 1] -> [B, H, W, C + 1]. Nothing of it depends on what is unknown."""
    return jnp.concatenate([jnp.where(known, image, 0), known.astype(image.dtype)], axis=-1)


def _box(key: jax.Array, places: np.ndarray) -> jax.Array:
    """A rectangle, centre and sides at random, inside or outside. Those that go across the image make it go on with a half."""
    of_centre, of_sides, of_across, of_inside = jax.random.split(key, 4)
    extent = jnp.asarray(places[-1, -1] + places[0, 0])
    centre = extent * jax.random.uniform(of_centre, (2,))
    sides = extent * jnp.exp(jax.random.uniform(of_sides, (2,), minval=np.log(_SMALLEST), maxval=np.log(_LARGEST)))
    across = jax.random.randint(of_across, (), 0, 4) == jnp.arange(2)
    inside = ((jnp.abs(places - centre) < sides / 2) | across).all(axis=-1)
    return inside ^ jax.random.bernoulli(of_inside, _INVERTED)


def _stroke(key: jax.Array, places: np.ndarray) -> jax.Array:
    """All that is near a chain of segments, of random lengths and directions."""
    of_start, of_turns, of_lengths, of_count, of_width = jax.random.split(key, 5)
    fewest, most = _SEGMENTS
    extent = jnp.asarray(places[-1, -1] + places[0, 0])
    turns = jax.random.uniform(of_turns, (most,), maxval=2 * np.pi)
    steps = jax.random.uniform(of_lengths, (most, 1), maxval=_LONGEST) * jnp.stack([jnp.sin(turns), jnp.cos(turns)], axis=-1)
    count = jax.random.randint(of_count, (), fewest, most + 1)
    # No thinner than a pixel, so that a stroke of the least width is not lost between their centres.
    width = jax.random.uniform(of_width, (), minval=_WIDTHS[0], maxval=_WIDTHS[1]) + places[0, 0].min()

    def draw(carry, row):
        hidden, start = carry
        number, step = row
        end = jnp.clip(start + step, 0, extent)
        along = end - start
        share = (((places - start) * along).sum(axis=-1) / jnp.maximum((along**2).sum(), 1e-12)).clip(0, 1)
        near = ((places - start - share[..., None] * along) ** 2).sum(axis=-1) < width**2
        return (hidden | (near & (number < count)), end), None

    start = (jnp.zeros(places.shape[:2], bool), extent * jax.random.uniform(of_start, (2,)))
    return jax.lax.scan(draw, start, (jnp.arange(most), steps))[0][0]


_SHAPES: dict[str, Callable[[jax.Array, np.ndarray], jax.Array]] = {"boxes": _box, "strokes": _stroke}
KINDS = (*_SHAPES, "mixed")


def draw_known(key: jax.Array, count: int, size: tuple[int, int], kind: str, all_hidden: float) -> jax.Array:
    """What is known of each of `count` images: bool [count, H, W, 1].

    Args:
      size: (H, W).
      kind: one of KINDS: hidden boxes, of which every fourth hides its outside, strokes, or half of the images each.
      all_hidden: the probability that nothing is known, so that the network still learns to draw whole images.
    """
    # The centres of the pixels, in the shorter side of the image.
    places = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in size), indexing="ij"), axis=-1) / min(size)
    places = places.astype(np.float32)
    shapes = list(_SHAPES.values()) if kind == "mixed" else [_SHAPES[kind]]

    def one(key):
        of_shape, of_kind, of_all = jax.random.split(key, 3)
        hidden = jnp.stack([shape(of_shape, places) for shape in shapes])[jax.random.randint(of_kind, (), 0, len(shapes))]
        return ~(hidden | jax.random.bernoulli(of_all, all_hidden))

    return jax.vmap(one)(jax.random.split(key, count))[..., None]
