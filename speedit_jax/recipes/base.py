"""The defaults of speedit_jax/config.py, where every knob is explained, as a recipe of their own.

  python -m speedit_jax.train --config=base:DiT-S/2 --config.data.source=folder:/path/to/images --workdir=runs/mine

The model's name stands after the colon.
"""

from speedit_jax.config import get_config

__all__ = ["get_config"]
