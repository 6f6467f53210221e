"""The recipe `digits`, in a clone: its text is in speedit_jax/recipes/digits.py, where an installed package has it too."""

from speedit_jax.recipes.digits import get_config

__all__ = ["get_config"]
