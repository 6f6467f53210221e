"""diffusers' DiTPipeline as a directory: transformer, autoencoder, scheduler and the classes' names.

DDIM with diffusers' "leading" spacing takes every (T // n)-th of T steps from 0 on, ours with num_steps="ddim{n}"; "trailing",
back from the last, is our "trailing{n}".
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.interop import directories, files, vae

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
# In the transformer's config.json, of ours alone: diffusers passes over names that begin so, and always has a shift of 1.
SHIFT = "_time_freq_shift"


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a pipeline has around its transformer.

    Attributes:
      scheduler: its scheduler_config.json; {} without.
      class_names: number -> name; {} without.
      autoencoder: its directory; None without.
    """

    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    autoencoder: Path | None = None


def read(directory: Path) -> Surroundings:
    """What is around the transformer of a pipeline's directory.

    Raises:
      UserError: a part cannot be read.
    """
    scheduler, autoencoder = directory / SCHEDULER, directory / "vae"
    index = directories.read_json(directory / INDEX) if (directory / INDEX).is_file() else {}
    if index.get("_class_name") == "PixArtSigmaPipeline":
        raise UserError(f"{INDEX} is of PixArt-Sigma; only PixArt-alpha of 256 and 512 px can be imported")
    try:
        class_names = {int(number): str(name) for number, name in (index.get("id2label") or {}).items()}
    except (AttributeError, ValueError) as e:
        raise UserError(f"{INDEX} has an id2label that does not give each class by its number") from e
    return Surroundings(
        directories.read_json(scheduler) if scheduler.is_file() else {},
        class_names,
        autoencoder.absolute() if autoencoder.is_dir() else None,
    )


def scheduler_config(betas: np.ndarray, prediction_type: str, num_steps: int | str) -> dict[str, Any]:
    """scheduler_config.json of the DDIM that draws as we do.

    Args:
      betas: [T] of the noise schedule.
      num_steps: how the run samples; "trailing50" is another spacing than the usual.
    """
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing" if str(num_steps).startswith("trailing") else "leading",
    }


def write(directory: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray], readme: str, around: Surroundings) -> None:
    """A DiTPipeline, or a DiTTransformer2DModel where there is no autoencoder to make one.

    Args:
      config: config.json of the transformer.
      state: its tensors by diffusers' names.
      around: what is around it; its autoencoder is copied.
    """
    directory.mkdir()
    transformer = directory / "transformer" if around.autoencoder else directory
    transformer.mkdir(exist_ok=True)
    storage.write_json(transformer / "config.json", config)
    files.write_safetensors(transformer / "diffusion_pytorch_model.safetensors", state)
    (directory / "README.md").write_text(readme)
    if not around.autoencoder:
        return
    (directory / "vae").mkdir()
    vae.copy(around.autoencoder, directory / "vae")
    (directory / "scheduler").mkdir()
    storage.write_json(directory / SCHEDULER, around.scheduler)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": around.class_names,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    storage.write_json(directory / INDEX, index)
