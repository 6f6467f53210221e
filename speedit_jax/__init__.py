"""Diffusion transformers in JAX: SpeeDiT timestep strategies, DiT backbones, sharded training and sampling."""

__version__ = "0.1.0"
