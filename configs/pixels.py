"""The recipe `pixels`, in a clone: its text is in speedit_jax/recipes/pixels.py, where an installed package has it too."""

from speedit_jax.recipes.pixels import get_config

__all__ = ["get_config"]
