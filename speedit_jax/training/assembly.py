"""Builds the parts of a run from its config and jits the step; the only place where config sections meet."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding

from speedit_jax import sharding, storage
from speedit_jax.data.description import Description
from speedit_jax.data.sources import Source
from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.flow_timesteps import make_flow_strategy
from speedit_jax.diffusion.gaussian import PREDICTIONS, GaussianDiffusion
from speedit_jax.diffusion.schedules import Schedule, make_schedule
from speedit_jax.diffusion.strategies import Strategy
from speedit_jax.diffusion.timesteps import make_strategy as _make_strategy
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.models.align import Projector, make_projector
from speedit_jax.models.build import Model, build
from speedit_jax.models.condition import Condition, TextShape, padded
from speedit_jax.training.check import check_backbone, check_batch, check_numbers, check_probe, check_regularizer
from speedit_jax.training.state import TrainState, initial_state, make_optimizer, state_shardings
from speedit_jax.training.step import make_train_step


def _schedule(config: ml_collections.ConfigDict) -> Schedule:
    diffusion = config.diffusion
    return make_schedule(diffusion.schedule, diffusion.num_steps, diffusion.beta_start, diffusion.beta_end)


def make_diffusion(config: ml_collections.ConfigDict) -> GaussianDiffusion | FlowMatching:
    schedule, path = _schedule(config), config.diffusion.path
    if path in PATHS:
        return _make_flow(config.diffusion)
    if path != "vp":
        raise UserError(f"unknown diffusion.path {path!r}; choose one of vp, {', '.join(PATHS)}")
    if config.diffusion.noise_scale != 1:
        raise UserError(f"diffusion.noise_scale={config.diffusion.noise_scale} is for flows: choose diffusion.path=linear or gvp")
    return GaussianDiffusion(schedule, config.diffusion.variance, config.diffusion.prediction, config.diffusion.loss)


def _make_flow(diffusion: ml_collections.ConfigDict) -> FlowMatching:
    path, predicts_x0 = diffusion.path, diffusion.prediction == "x0"
    if diffusion.loss != "mse":
        raise UserError(f"diffusion.loss={diffusion.loss}: a flow (diffusion.path={path}) has no variational bound; use mse")
    if diffusion.prediction not in PREDICTIONS:
        raise UserError(f"unknown diffusion.prediction {diffusion.prediction!r}; choose one of {', '.join(PREDICTIONS)}")
    if predicts_x0 and not 0 < diffusion.x0_clamp < 1:
        raise UserError(f"diffusion.x0_clamp={diffusion.x0_clamp}: must be between 0 and 1; JiT takes 0.05")
    if diffusion.noise_scale <= 0:
        raise UserError(f"diffusion.noise_scale={diffusion.noise_scale}: must be positive")
    learned_variance = diffusion.variance == "learned_range"
    return FlowMatching(path, diffusion.num_steps, learned_variance, predicts_x0, diffusion.x0_clamp, diffusion.noise_scale)


def make_strategy(config: ml_collections.ConfigDict, diffusion: GaussianDiffusion | FlowMatching) -> Strategy:
    batch_size = config.training.batch_size
    if isinstance(diffusion, FlowMatching):
        strategy = make_flow_strategy(diffusion, _schedule(config), batch_size, **config.timesteps)
    else:
        # The bound does not depend on what is predicted, so neither does its weight.
        prediction = "epsilon" if diffusion.bound_alone else diffusion.prediction
        strategy = _make_strategy(diffusion.schedule, prediction=prediction, **config.timesteps)
    if strategy.probe_every and batch_size % (2 * strategy.bins):
        raise UserError(
            f"training.batch_size={batch_size}: to measure gradients, {strategy.name} wants a multiple of {2 * strategy.bins}"
        )
    return strategy


def make_autoencoder(config: ml_collections.ConfigDict, source: Source, mesh: Mesh) -> Autoencoder | None:
    """What turns the source's images into latents, or latents into pictures; None where there is none.

    Raises:
      UserError: the autoencoder cannot be read, or is not that of the latents.
    """
    where = config.data.vae
    if source.encoded_by and not where and storage.path(source.encoded_by["vae"]).exists():
        where = source.encoded_by["vae"]
    if (where or source.encoded_by) and config.sampling.clip:
        raise UserError("sampling.clip=True is for pixels, but this run trains on latents; set sampling.clip=False")
    if not where:
        return None
    autoencoder = Autoencoder(where, mesh)
    if source.encoded_by:
        autoencoder.check(source.encoded_by)
    return autoencoder


def make_model(
    config: ml_collections.ConfigDict, mesh: Mesh, image_shape, num_classes: int, text: TextShape | None = None
) -> Model:
    """The network, wired to the mesh; conditioned on `text` where that is given, and else on the classes.

    Raises:
      UserError: the heads do not divide over the mesh, or the parts do not fit each other.
    """
    model = build(
        config.model,
        image_shape=tuple(image_shape),
        num_classes=num_classes,
        learned_variance=config.diffusion.variance == "learned_range",
        platform=mesh.devices.flat[0].platform,
        text=text,
        tokens=config.tokens,
        hinted=config.data.mask != "",
        constrain=sharding.constrain,
        batch_axes=sharding.BATCH_AXES,
        head_axis=sharding.HEAD_AXIS,
    )
    if model.heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor={mesh.shape['tensor']} does not divide the {model.heads} heads of {config.model.name}")
    return model


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run on a mesh, before its first step.

    Attributes:
      encoded_by: the identity of the autoencoder whose latents the model learns; None where it learns images.
      online: whether the autoencoder encodes each batch of images on its way to the step.
      texts: the captions, as data/texts.py has them; None without text.
      projector: the head of alignment; None without it.
      features: the shape of the features of an image, (h, w, F), that it aligns with; None where it does not.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: Model
    diffusion: GaussianDiffusion | FlowMatching
    strategy: Strategy
    optimizer: optax.GradientTransformation
    autoencoder: Autoencoder | None = None
    encoded_by: dict[str, Any] | None = None
    online: bool = False
    texts: Any = None
    projector: Projector | None = None
    features: tuple[int, int, int] | None = None

    @property
    def step_flops(self) -> int:
        """Of one image in a training step, its part in alignment included: matrix products and filters only."""
        if not self.projector:
            return self.model.step_flops
        head = 3 * self.model.tokens * self.projector.forward_flops
        if self.features:
            return self.model.step_flops + head
        share = self.config.regularizer.align_teacher_depth / self.model.blocks  # what stands around the blocks is small
        return self.model.step_flops + round(share * self.model.forward_flops) + head

    @property
    def rows(self) -> NamedSharding:
        """Of a batch."""
        return sharding.batch_sharding(self.mesh)

    @functools.cached_property
    def _states(self) -> tuple[TrainState, TrainState]:
        decays = self.config.training.extra_ema_decays
        return state_shardings(self.mesh, self.model, self.optimizer, self.strategy, decays, self.projector)

    @property
    def shapes(self) -> TrainState:
        """A ShapeDtypeStruct for each array of the state."""
        return self._states[0]

    @property
    def shardings(self) -> TrainState:
        """A NamedSharding for each array of the state."""
        return self._states[1]

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the batch that the step takes: images [B, H, W, C] or an autoencoder's moments [B, h, w, 2C], labels [B], text and
        features."""
        batch, (*size, channels) = self.config.training.batch_size, self.model.image_shape
        name, channels = ("moments", 2 * channels) if self.encoded_by else ("image", channels)
        shapes = {
            name: jax.ShapeDtypeStruct((batch, *size, channels), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }
        shapes |= {"text": self.model.conditions(batch)} if self.model.text else {}
        shapes |= {"features": jax.ShapeDtypeStruct((batch, *self.features), jnp.float16)} if self.features else {}
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.rows), shapes)

    @property
    def null_text(self) -> Condition | None:
        """The null condition of a model with text that can be guided."""
        return padded(*self.texts.null, self.model.text) if self.model.text and self.model.guidable else None

    def initial_state(self, key: jax.Array) -> TrainState:
        """The state before the first step, on the mesh."""
        decays = self.config.training.extra_ema_decays
        with jax.set_mesh(self.mesh):
            return jax.jit(
                lambda k: initial_state(self.model, self.optimizer, self.strategy, k, decays, self.projector),
                out_shardings=self.shardings,
            )(key)

    def jit_step(self, donate: bool = True, compiler_options: dict[str, Any] | None = None):
        """The training step (state, batch, key) -> (state, metrics), jitted over the mesh; call it under jax.set_mesh(mesh).

        Args:
          donate: give the state's memory to the next state.
        """
        parts = self.model, self.diffusion, self.strategy, self.optimizer, self.config
        return jax.jit(
            make_train_step(*parts, self.encoded_by, self.null_text, self.projector),
            in_shardings=(self.shardings, self.rows, None),
            out_shardings=(self.shardings, None),
            donate_argnums=0 if donate else (),
            compiler_options=compiler_options,
        )

    def lower_step(self) -> jax.stages.Lowered:
        """The training step, lowered on shapes alone."""
        # Nothing may run under a mesh of devices that are not there, and finding the shardings runs a little.
        step = self.jit_step()
        with jax.set_mesh(self.mesh):
            return step.lower(self.shapes, self.batch_shapes(), jax.eval_shape(jax.random.key, 0))


def assemble(config: ml_collections.ConfigDict, source: Source | Description, mesh: Mesh) -> Assembly:
    """All parts of the run that `config`, the whole config, describes.

    Args:
      source: the data; only its attributes are read.

    Raises:
      UserError: a setting is impossible, or does not fit the data or the mesh.
    """
    check_numbers(config)
    check_batch(config, mesh)
    check_backbone(config.model)
    diffusion = make_diffusion(config)
    strategy, optimizer = make_strategy(config, diffusion), make_optimizer(config)
    autoencoder = make_autoencoder(config, source, mesh)
    # The source holds latents already, or its images are encoded as they come, or the model learns images.
    online = autoencoder is not None and source.encoded_by is None
    image_shape = autoencoder.latent_shape(source.image_shape) if online else source.image_shape
    texts = getattr(source, "texts", None)
    model = make_model(config, mesh, image_shape, len(source.class_names), texts and TextShape.of(texts))
    check_probe(config, strategy, model, mesh)
    features = getattr(source, "features", None)
    features = features and features.shape
    check_regularizer(config, model, diffusion, features)
    encoded_by = autoencoder.identity if online else source.encoded_by
    given = (config.regularizer.align_head, features[2]) if features else ()
    projector = make_projector(model, *given) if config.regularizer.align else None
    around = (autoencoder, encoded_by, online, texts, projector, features)
    return Assembly(config, mesh, model, diffusion, strategy, optimizer, *around)
