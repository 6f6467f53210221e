"""The recipe `emoji`, in a clone: its text is in speedit_jax/recipes/emoji.py, where an installed package has it too."""

from speedit_jax.recipes.emoji import get_config

__all__ = ["get_config"]
