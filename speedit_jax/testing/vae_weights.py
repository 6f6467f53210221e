"""Random VAE weights and inputs that both sides make alike, each from its name: they need not be stored."""

import json
import zlib
from pathlib import Path

import numpy as np

# The architecture of Stable Diffusion's VAEs, with tiles of 32 pixels; and what later VAEs do otherwise.
CONFIGS = {
    "full": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "small": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 16,
        "sample_size": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
# The first one's kind of latents, from a network as small as the second.
CONFIGS["four"] = CONFIGS["small"] | {"latent_channels": 4, "scaling_factor": 0.5, "shift_factor": None}
# (height, width) of images. The border cuts some tiles; in the small image, the last row to less than an overlap. The large image
# is one column of tiles, because each shape of tile compiles for seconds.
SIZES = {"full": (64, 64), "small": (20, 28)}
TILED_SIZES = {"full": (56, 24), "small": (38, 24)}


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in PyTorch's layout that keeps activations of order one."""
    if len(shape) == 1:
        return np.float32(name.split(" ")[0].endswith("weight")) + 0.1 * normal(name, shape)
    return normal(name, shape) * np.float32(np.prod(shape[1:]) ** -0.5)


def inputs(kind: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and unscaled latents of another, NCHW."""
    config = CONFIGS[kind]
    down = 2 ** (len(config["block_out_channels"]) - 1)
    channels = config.get("latent_channels", 4)
    image = np.tanh(normal(f"image {height} {width}", (1, 3, height, width)))
    return image, normal(f"latents {height} {width}", (1, channels, height // down, width // down))


def write_vae(directory: Path, kind: str, seed: int = 0) -> Path:
    """A diffusers directory of random weights."""
    import jax
    from safetensors.numpy import save_file

    from speedit_jax.interop.vae import CONFIG, WEIGHTS, tensor_name
    from speedit_jax.models.vae import VaeConfig, build_vae

    directory.mkdir(parents=True, exist_ok=True)
    shapes = jax.eval_shape(build_vae(VaeConfig.from_diffusers(CONFIGS[kind])).init, jax.random.key(0))
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = tensor_name(tuple(key.key for key in path))
        axes = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(range(leaf.ndim))[::-1]
        tensors[name] = weight(f"{name} {seed}" if seed else name, tuple(leaf.shape[axis] for axis in axes))
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(CONFIGS[kind]))
    return directory
