"""Random weights of Inception-v3, images and features that both sides make alike, each from its name: they need not be stored."""

import numpy as np

from speedit_jax.testing import vae_weights

# Images of the whole network, uint8 NCHW; none has the network's own size.
IMAGES = {"wide": (2, 3, 40, 72), "large": (1, 3, 330, 310)}
# Inputs of single blocks, NCHW: odd and unlike sides.
BLOCKS = {
    "Mixed_5b": (1, 192, 5, 7),
    "Mixed_6a": (1, 288, 9, 8),
    "Mixed_6b": (1, 768, 5, 6),
    "Mixed_7a": (1, 768, 7, 9),
    "Mixed_7b": (1, 1280, 3, 4),
    "Mixed_7c": (1, 2048, 3, 4),
}
STORED = 8  # of a block's channels every eighth is kept
# Sets of features and logits: name -> shape.
FEATURES = {"reference": (420, 24), "generated": (350, 24), "logits": (203, 11)}
IS_SPLITS, NEIGHBOURS = 4, 3


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in PyTorch's layout that keeps activations of order one through the ReLUs."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.float32)
    if name.endswith("running_var"):
        return np.exp(0.3 * vae_weights.normal(name, shape))
    return vae_weights.weight(name, shape) * np.float32(2**0.5 if len(shape) == 4 else 1)


def images(name: str) -> np.ndarray:
    """Smooth enough that a wrong resize shows, and not only noise: uint8."""
    n, channels, height, width = IMAGES[name]
    coarse = vae_weights.normal(f"image {name}", (n, channels, -(-height // 5), -(-width // 5)))
    return np.uint8(np.clip(128 + 60 * coarse, 0, 255)).repeat(5, 2).repeat(5, 3)[:, :, :height, :width]


def block_input(name: str) -> np.ndarray:
    """Not negative, as behind a ReLU."""
    return np.abs(vae_weights.normal(f"input of {name}", BLOCKS[name]))


def features(name: str) -> np.ndarray:
    """Correlated features, float64; the generated ones are a little narrower than the reference's, and moved."""
    n, d = FEATURES[name]
    mix = vae_weights.normal("mix", (d, d)) / d**0.5 + np.eye(d)
    values = vae_weights.normal(f"features {name}", (n, d)).astype(np.float64) @ mix
    return 1.8 * values + 0.4 if name == "generated" else 2 * values
