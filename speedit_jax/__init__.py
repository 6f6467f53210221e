"""Diffusion transformers in JAX: SpeeDiT timestep strategies, DiT and DiG backbones, sharded training and sampling.

`run = speedit_jax.load("runs/digits")` opens a trained run: see speedit_jax/door.py.
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    # Importing the package stays fast and imports no jax: the commands set JAX up before they do.
    if name == "load":
        from speedit_jax.door import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
