"""The published PyTorch code run as it is, from a checkout: github.com/facebookresearch/DiT and those after it. Needs torch."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def load(name: str, path: Path) -> types.ModuleType:
    """Imports a module or package by its path, under a name of our own.

    DiT's and SpeeDiT's checkouts both have a package called diffusion, and the parent of SpeeDiT's imports what only its training
    needs.
    """
    is_package = path.is_dir()
    spec = importlib.util.spec_from_file_location(
        name,
        path / "__init__.py" if is_package else path,
        submodule_search_locations=[str(path)] if is_package else None,
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class PatchEmbed(nn.Module):
    """Stands in for timm's: [B, C, H, W] -> [B, T, D]."""

    def __init__(self, size, patch, channels, width, bias):
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    """Stands in for timm's: [B, T, D] -> [B, T, D]."""

    def __init__(self, width, num_heads, qkv_bias):
        super().__init__()
        self.heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Stands in for timm's: [B, T, D] -> [B, T, D]."""

    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        assert drop == 0
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def provide_timm() -> None:
    """DiT takes three small modules from timm, which does not import without torchvision.

    The stand-ins then serve as well: with timm 1.0.31 the recorded arrays are the same to the bit.
    """
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError:
        module = types.ModuleType("timm.models.vision_transformer")
        module.PatchEmbed, module.Attention, module.Mlp = PatchEmbed, Attention, Mlp
        sys.modules[module.__name__] = module


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32, from numpy: torch's generators change with its version."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def make_network(models: types.ModuleType, **sizes: int) -> nn.Module:
    """A DiT all of whose weights are random: the published initialisation computes zero, whatever the rest does."""
    rng = np.random.default_rng(0)
    network = models.DiT(**sizes).eval()  # eval: labels are never dropped
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # Activations of order one; the labels' rows are large, so that guidance shows.
            scale = 1.0 if "embedding" in name else 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = normal(rng, *parameter.shape) * scale
    return network
