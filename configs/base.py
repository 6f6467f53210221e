"""The recipe `base`, in a clone: its text is in speedit_jax/recipes/base.py, where an installed package has it too."""

from speedit_jax.recipes.base import get_config

__all__ = ["get_config"]
