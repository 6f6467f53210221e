"""A run from Python: `speedit_jax.load`."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from speedit_jax import sharding
from speedit_jax.config import LARGEST_SEED
from speedit_jax.diffusion.inverse import Plan
from speedit_jax.encoders.autoencoder import Autoencoder, open_autoencoder
from speedit_jax.encoders.text_encoder import TextEncoder
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.sampling.conditions import Conditions, Labels
from speedit_jax.sampling.draw import draw_batches
from speedit_jax.sampling.images import to_uint8
from speedit_jax.sampling.known import Pictures, choose_plan, open_pictures, take_arrays
from speedit_jax.sampling.labels import parse_labels
from speedit_jax.sampling.prompts import encode_prompts, open_encoder
from speedit_jax.sampling.sampler import Diffusion, Settings, check_given, make_sampler, resolve
from speedit_jax.training.run import Run, open_run


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained network with all that sampling needs, as its run saved it.

    Attributes:
      run: the checkpoint that it came from, with `workdir`, `step` and `class_names`.
      params: the weights on the devices; a tree of arrays.
      autoencoder: decodes latents to images; None for a run on pixels.
    """

    run: Run
    params: Any
    autoencoder: Autoencoder | None
    _text_encoder: str | None = None
    _samplers: dict[Settings, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The whole config of the run."""
        return self.run.config

    @property
    def model(self) -> Model:
        """The network: model.apply(params, x [B, H, W, C], t [B], y) -> [B, H, W, C] or, with a variance, 2C channels."""
        return self.run.model

    @property
    def diffusion(self) -> Diffusion:
        """The noise schedule or flow, with its losses."""
        return self.run.diffusion

    @property
    def class_names(self) -> list[str]:
        """Empty for an unconditional run."""
        return self.run.class_names

    def sample(
        self,
        labels: Sequence[int | str] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        inpaint: str | None = None,
        resample: int | None = None,
        jump: int | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draws images; image i of a seed is the same as in `python -m speedit_jax.sample`.

        Args:
          labels: classes by name or number, taken in turn; None is all classes.
          prompts: of a run on text, instead: what to draw, taken in turn. Those that are too long are cut, with a warning.
          negative_prompt: what guidance leads away from.
          num_images: None is one of each label or prompt.
          seed: of the noise, 0 to 2^32 - 1.
          batch_size: images at a time, over all devices.
          image: a picture to start from or to complete, uint8 [H, W, C]; of [n, H, W, C] sample i takes number i mod n.
          mask: where to fill it, bool [H, W] or [n, H, W]; elsewhere its pixels stay.
          strength: the share of the sampling steps that is run from the picture on, (0, 1]; None is 1, pure noise.
          inpaint: how pixels stay, "projection", "repaint" or, of a run with data.mask, "network"; None is network of such a run,
            and else projection.
          resample: how often each `jump` steps are run; None is 10 for repaint and 1 for the others.
          jump: sampling steps that `resample` repeats; None is 10.
          settings: replace those of the run, as `sampling.sampler.Settings`: sampler, num_steps, guidance_scale,
            guidance_channels, clip, ...

        Returns:
          uint8 [num_images, H, W, C]; latents without an autoencoder are no pictures: float32 [num_images, h, w, C].

        Raises:
          UserError: there is no such class, there are labels for a run on text or the other way round, the model cannot serve the
            settings, or what it draws is not finite.
        """
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed={seed}: must lie in 0..{LARGEST_SEED}")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        latents = self.autoencoder is not None or self.run.draws_latents
        conditions = self._conditions(labels, prompts, negative_prompt)
        count = conditions.count if num_images is None else num_images
        chosen = resolve(Settings.from_config(self.config.sampling, self.model, latents=latents, **settings), self.diffusion)
        check_given(settings, chosen)
        if negative_prompt and chosen.guidance_scale == 1:
            raise UserError("negative_prompt has no effect without guidance; give a guidance_scale above 1")
        if negative_prompt and chosen.sparse:
            raise UserError("negative_prompt has no effect with sparse_weak: the network with fewer tokens gets the prompts, too")
        if image is None and any(value is not None for value in (mask, strength, inpaint, resample, jump)):
            raise UserError("mask, strength, inpaint, resample and jump need an image")
        if image is not None:
            plan = choose_plan(mask is not None, self.model.hinted, strength, inpaint, resample, jump)
            pictures = self._pictures(image, mask, plan)
            sampler = make_sampler(self.model, self.diffusion, chosen, self.run.mesh, pictures=pictures)
        else:
            pictures, sampler = None, self._samplers.get(chosen)
            sampler = self._samplers[chosen] = sampler or make_sampler(self.model, self.diffusion, chosen, self.run.mesh)
        batch = min(batch_size, count)
        batch += -batch % sharding.batch_devices(self.run.mesh)
        key = jax.random.key(seed)
        drawn = draw_batches(sampler, self.params, key, conditions, count, batch, self.autoencoder)
        images = np.concatenate([images for _, images in drawn])[:count]
        if self.run.draws_latents and not self.autoencoder:
            return images
        return pictures.composite(0, to_uint8(images)) if pictures else to_uint8(images)

    def _pictures(self, image: np.ndarray, mask: np.ndarray | None, plan: Plan) -> Pictures:
        if self.run.draws_latents and not self.autoencoder:
            raise UserError("image: this run draws latents; name the autoencoder that they are of, load(..., vae=DIR)")
        shape = self.model.image_shape
        drawn = self.autoencoder.image_shape(shape) if self.autoencoder else shape
        return open_pictures(*take_arrays(image, mask, drawn), plan, shape, self.autoencoder)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder | None:
        """Encodes prompts, opened when it is first asked for; None for a run without text."""
        identity = self.run.text_encoder
        return identity and open_encoder(self._text_encoder, identity, self.model.text)

    def _conditions(self, labels: Sequence[int | str] | None, prompts: Sequence[str] | None, negative: str) -> Conditions:
        if not self.run.text_encoder:
            if prompts is not None or negative:
                raise UserError("prompts: this run was not trained on text; give labels")
            if isinstance(labels, str | int):
                raise UserError(f"labels={labels!r}: give a list of classes")
            return Labels(parse_labels(None if labels is None else list(map(str, labels)), self.class_names))
        if labels is not None or not prompts or isinstance(prompts, str):
            raise UserError('this run was trained on text: give prompts=["TEXT", ...], and no labels')
        conditions, cut = encode_prompts(self.text_encoder, prompts, negative, self.model.text)
        for warning in cut:
            warnings.warn(warning, stacklevel=3)
        return conditions


def load(
    workdir: str | Path,
    *,
    step: int | str = "newest",
    weights: str = "ema",
    vae: str | None = None,
    text_encoder: str | None = None,
    dtype: str | None = None,
    tile: bool = False,
) -> LoadedRun:
    """Opens a run of `train`, or weights that `convert` imported.

    Args:
      workdir: its directory.
      step: of the checkpoint: a number, "newest", or "best" of the run's evaluations.
      weights: "ema", "raw", or "ema_DECAY" for one of training.extra_ema_decays.
      vae: of a run on latents: where its autoencoder is now; None is where it was in training, "none" draws the latents alone.
      text_encoder: of a run on text: where its text encoder is now; None is where it was in training.
      dtype: of activations: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or "bfloat16"; None is the run's model.dtype.
      tile: decode latents in overlapping tiles, for pictures that do not fit in memory.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    run = open_run(workdir, step, dtype=dtype)
    autoencoder = open_autoencoder(vae, run.encoded_by, run.model.image_shape[2], run.mesh, dtype or "auto", tile)
    if tile and not autoencoder:
        raise UserError("tile=True: nothing is decoded here; it is for latents and their autoencoder")
    if text_encoder and not run.text_encoder:
        raise UserError(f"text_encoder={text_encoder}: {run.workdir} was not trained on text")
    return LoadedRun(run, run.restore(weights), autoencoder, text_encoder)
