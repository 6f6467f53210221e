"""The recipe `imagenet`, in a clone: its text is in speedit_jax/recipes/imagenet.py, where an installed package has it too."""

from speedit_jax.recipes.imagenet import get_config

__all__ = ["get_config"]
