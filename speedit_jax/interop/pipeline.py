"""diffusers' DiTPipeline as a directory: transformer, autoencoder, scheduler and the classes' names.

DDIM with diffusers' "leading" spacing takes every (T // n)-th of T steps from 0 on: ours with num_steps="ddim{n}".
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax.interop import files, vae


def write(
    directory: Path,
    config: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    readme: str,
    autoencoder: Path | None,
    betas: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """A DiTPipeline, or a DiTTransformer2DModel where there is no autoencoder to make one.

    Args:
      config: config.json of the transformer.
      state: its tensors by diffusers' names.
      autoencoder: a directory of interop/vae.py.
      betas: [T] of the noise schedule.
    """
    directory.mkdir()
    transformer = directory / "transformer" if autoencoder else directory
    transformer.mkdir(exist_ok=True)
    _write_json(transformer / "config.json", config)
    files.write_safetensors(transformer / "diffusion_pytorch_model.safetensors", state)
    (directory / "README.md").write_text(readme)
    if autoencoder:
        _write_around(directory, autoencoder, betas, class_names)


def _write_around(directory: Path, autoencoder: Path, betas: np.ndarray, class_names: Sequence[str]) -> None:
    """What makes a pipeline of a directory that has a transformer."""
    (directory / "vae").mkdir()
    for name in (vae.CONFIG, vae.WEIGHTS):
        shutil.copyfile(autoencoder / name, directory / "vae" / name)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
    (directory / "scheduler").mkdir()
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": dict(enumerate(class_names)),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(directory / "model_index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
