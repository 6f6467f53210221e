"""Diffusion mathematics as pure functions of arrays; knows nothing of models, devices or files."""
