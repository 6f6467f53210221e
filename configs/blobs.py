"""The recipe `blobs`, in a clone: its text is in speedit_jax/recipes/blobs.py, where an installed package has it too."""

from speedit_jax.recipes.blobs import get_config

__all__ = ["get_config"]
