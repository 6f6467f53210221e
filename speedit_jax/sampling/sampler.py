"""The sampling function, jitted over a mesh, and the samples that training draws with it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.diffusion import masks, samplers
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_samplers import FLOW_SAMPLERS, sample_flow
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.inverse import NOTHING, Known, Plan
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.sampling.conditions import Conditions
from speedit_jax.sampling.draw import draw_batches
from speedit_jax.sampling.images import to_uint8
from speedit_jax.sampling.known import Pictures, check_sampler
from speedit_jax.sampling.path_drop import check_path_drop, without_middle
from speedit_jax.sampling.sparse_guidance import check_sparse, sparse_networks

Diffusion = GaussianDiffusion | FlowMatching


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
      sampler: one of samplers.SAMPLERS for diffusion and of flow_samplers.FLOW_SAMPLERS for flows, or "auto": ddim or euler.
      num_steps: of the sampler (two passes each under guidance), or of diffusion which steps: schedules.sampling_steps.
      eta: noise of ddim and dpm++, 0 to 1.
      guidance_scale: 1 is none.
      guidance_channels: how many of the prediction's channels are guided; 0 is all.
      clip: clip the predicted image to [-1, 1]; for pixels, not for latents.
      guidance_schedule, guidance_low, guidance_high: as `samplers.guidance_scales`.
      spacing: of the steps, as `samplers.spaced_steps`.
      sparse_strong, sparse_weak: shares of the tokens that skip the middle blocks, of the network and of itself as its guide
        (sparse_guidance.py); equal: the null label guides, and all tokens are in all blocks.
      path_drop_guidance: the prediction for the null condition skips the middle blocks, too (path_drop.py).
    """

    sampler: str
    num_steps: int | str | Sequence[int]
    eta: float
    guidance_scale: float
    guidance_channels: int
    clip: bool
    guidance_schedule: str = "constant"
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    spacing: str = "even"
    sparse_strong: float = 0.0
    sparse_weak: float = 0.0
    path_drop_guidance: bool = False

    def __post_init__(self):
        if isinstance(self.num_steps, list):  # as JSON has sections
            object.__setattr__(self, "num_steps", tuple(self.num_steps))

    @property
    def sparse(self) -> bool:
        """Whether the network with fewer tokens is its guide."""
        return self.sparse_strong != self.sparse_weak

    def record(self) -> dict[str, Any]:
        """JSON. What is off and younger than other keys is left out, so that earlier versions' records still compare."""
        young = () if self.sparse else ("sparse_strong", "sparse_weak")
        young += () if self.path_drop_guidance else ("path_drop_guidance",)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in young}

    @classmethod
    def from_config(
        cls, config: ml_collections.ConfigDict, model: Model, guide: Model | None = None, latents: bool = False, **given: Any
    ) -> "Settings":
        """From a config's `sampling` section; without guidance where the model has nothing to be guided away from.

        Args:
          latents: the model draws latents, which are never clipped.
          given: what replaces the config's values; None does not.

        Raises:
          UserError: latents are to be clipped.
        """
        if latents and given.get("clip"):
            raise UserError("clip=True: this run draws latents, and only pixels lie in [-1, 1]; leave it out")
        settings = cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
        if not model.guidable and guide is None and not settings.sparse and not given.get("sparse_weak"):
            settings = dataclasses.replace(settings, guidance_scale=1.0)
        if latents:
            settings = dataclasses.replace(settings, clip=False)
        return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


def resolve(settings: Settings, diffusion: Diffusion) -> Settings:
    """`settings` with the sampler that "auto" stands for.

    Raises:
      UserError: a sampler of flows for diffusion, or the other way round.
    """
    flow = isinstance(diffusion, FlowMatching)
    choices = FLOW_SAMPLERS if flow else samplers.SAMPLERS
    sampler = ("euler" if flow else "ddim") if settings.sampler == "auto" else settings.sampler
    if sampler not in choices:
        kind = f"a flow (diffusion.path={diffusion.path})" if flow else "diffusion"
        raise UserError(f"unknown sampler {sampler!r} for {kind}; choose one of auto, {', '.join(choices)}")
    return dataclasses.replace(settings, sampler=sampler)


def check_given(given: dict[str, Any], settings: Settings) -> None:
    """Raises a UserError for what was asked for, as in `Settings.from_config`, and the sampler does not look at.

    A config may hold it for another sampler.

    Args:
      settings: as `resolve` gives them.
    """
    if given.get("eta") is not None and settings.sampler not in ("ddim", "dpm++"):
        raise UserError(f"eta={given['eta']} is noise of ddim and dpm++, not of {settings.sampler}; leave it out")
    if given.get("spacing") not in (None, "even") and settings.sampler in FLOW_SAMPLERS:
        raise UserError(f"spacing={given['spacing']} is for diffusion: the steps of a flow are evenly spaced; leave it out")
    if settings.guidance_scale == 1:
        off = {"guidance_channels": 0, "guidance_schedule": "constant", "guidance_low": 0, "guidance_high": 1}
        off |= {} if settings.sparse_strong else {"sparse_weak": 0}  # the strong network alone may be wanted
        for name, value in off.items():
            if given.get(name) not in (None, value):
                raise UserError(f"{name}={given[name]} has no effect without guidance; give another guidance_scale than 1")


def image_noise(key: jax.Array, indices: jax.Array, stream: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape] of which row i depends only on (key, indices[i], stream).

    So image number i of a seed starts from the same noise whatever the batch it is drawn in and the devices it runs on.
    """

    def one(index):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index), stream), shape)

    return jax.vmap(one)(indices)


def _check(settings: Settings, model: Model, guide: Model | None) -> None:
    """Raises a UserError for settings that the model cannot serve and that nothing else checks."""
    channels = model.image_shape[-1]
    check_sparse(settings.sparse_strong, settings.sparse_weak, model, guide is not None)
    if settings.path_drop_guidance:
        check_path_drop(model, settings.guidance_scale, guide is not None)
    if settings.guidance_scale != 1 and not model.guidable and guide is None and not settings.sparse:
        raise UserError(
            f"guidance_scale={settings.guidance_scale} needs a model trained with classes or text and model.label_dropout > 0;"
            " use guidance_scale=1"
        )
    if not 0 <= settings.guidance_scale < math.inf:
        raise UserError(f"guidance_scale={settings.guidance_scale}: must be 0 or more and finite; 1 is no guidance")
    if not 0 <= settings.guidance_channels <= channels:
        raise UserError(f"guidance_channels={settings.guidance_channels}: must lie in 0..{channels}")
    if not 0 <= settings.eta <= 1:
        raise UserError(f"eta={settings.eta}: must lie in [0, 1]")


def _jitted_sampler(
    model: Model,
    diffusion: Diffusion,
    settings: Settings,
    mesh: Mesh,
    guide: Model | None = None,
    plan: Plan = NOTHING.plan,
):
    """As `make_sampler`, on arrays that are on the mesh; the known images and masks are its last arguments."""
    settings = resolve(settings, diffusion)
    _check(settings, model, guide)
    check_sampler(plan, settings.sampler, isinstance(diffusion, FlowMatching))
    scales = samplers.guidance_scales(
        diffusion.schedule.num_steps,
        settings.guidance_scale,
        settings.guidance_schedule,
        settings.guidance_low,
        settings.guidance_high,
    )

    def sample(params, key, indices, y, null_text, images=None, mask=None):
        params, guide_params = params if guide else (params, None)
        hint = None if mask is None else masks.hint(images, mask)
        told, its = (m and m.told(hint if m.hinted else None) for m in (model, guide))
        network, other = functools.partial(told.apply, params), its and functools.partial(its.apply, guide_params)
        if settings.sparse:
            rates = settings.sparse_strong, settings.sparse_weak
            network, other = sparse_networks(told, params, rates, key, indices, diffusion.schedule_index)
        null = null_text if model.text else model.null_label
        if settings.path_drop_guidance:
            other = without_middle(told, params, null)
        denoise = samplers.guided(
            network,
            y,
            null,
            scales,
            settings.guidance_channels or model.image_shape[-1],
            other,
            diffusion.schedule_index,
        )
        inputs = (
            lambda x, t: sharding.constrain(denoise(x, t), ("batch", None, None, None)),
            # Stream 0 is the starting noise; the noise of step k is stream k + 1.
            image_noise(key, indices, 0, model.image_shape),
            diffusion,
            lambda k: image_noise(key, indices, k + 1, model.image_shape),
        )
        common = {"sampler": settings.sampler, "num_steps": settings.num_steps, "clip": settings.clip}
        common["known"] = Known(images, mask, plan)
        if isinstance(diffusion, FlowMatching):
            return sample_flow(*inputs, **common)
        return samplers.sample(*inputs, **common, spacing=settings.spacing, eta=settings.eta)

    return jax.jit(sample, out_shardings=sharding.replicated(mesh))


def lower_sampler(model: Model, diffusion: Diffusion, settings: Settings, mesh: Mesh, batch: int) -> jax.stages.Lowered:
    """The sampler of `batch` images, lowered on shapes alone; parameters are sharded as the mesh says.

    Raises:
      UserError: settings that the model cannot serve.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(mesh, model.axes, shapes)
    params = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)
    rows = sharding.batch_sharding(mesh)
    indices, y, null_text = _inputs(model, batch)
    indices, y = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), (indices, y))
    with jax.set_mesh(mesh):
        lowered = _jitted_sampler(model, diffusion, settings, mesh)
        return lowered.lower(params, jax.eval_shape(jax.random.key, 0), indices, y, null_text)


def _inputs(model: Model, batch: int) -> tuple[Any, Any, Any]:
    """The shapes of indices, conditions and the null text of a batch."""
    y = model.conditions(batch)
    null_text = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), y) if model.text else None
    return jax.ShapeDtypeStruct((batch,), jnp.int32), y, null_text


def make_sampler(
    model: Model,
    diffusion: Diffusion,
    settings: Settings,
    mesh: Mesh,
    guide: Model | None = None,
    pictures: Pictures | None = None,
) -> Callable[..., jax.Array]:
    """sample(params, key, indices [B], y, null_text=None) -> [B, H, W, C] float32, whole on every device.

    It returns before they are computed. y has the form of `Model.conditions`; of text, `null_text` is the null condition.

    Args:
      model, diffusion: of training.
      settings: how to sample.
      mesh: B must be a multiple of its batch devices.
      guide: a weaker model to be guided away from, instead of the null condition; params are then a pair, (model's, guide's).
      pictures: that the samples start from or complete.

    Raises:
      UserError: settings that the model cannot serve.
    """
    rows = sharding.batch_sharding(mesh)
    jitted = _jitted_sampler(model, diffusion, settings, mesh, guide, pictures.plan if pictures else NOTHING.plan)

    def known(indices):
        return pictures.at(indices) if pictures else ()

    # Unknown samplers and impossible numbers of steps raise while tracing: now, not after an hour of training.
    shapes = _inputs(model, sharding.batch_devices(mesh))
    params = [jax.eval_shape(m.init, jax.random.key(0)) for m in (model, guide) if m]
    with jax.set_mesh(mesh):
        jax.eval_shape(
            jitted, params if guide else params[0], jax.random.key(0), *shapes, *known(np.zeros(shapes[0].shape, np.int32))
        )

    def run(params, key, indices, y, null_text=None):
        forms = _inputs(model, len(indices))[:2]
        indices, y = jax.tree.map(lambda x, form: np.asarray(x, form.dtype), (indices, y), forms)
        indices, y, images = jax.tree.map(lambda x: sharding.from_host(rows, x), (indices, y, known(indices)))
        with jax.set_mesh(mesh):
            return jitted(params, key, indices, y, null_text, *images)

    return run


@dataclasses.dataclass(frozen=True)
class FixedSamples:
    """Samples of whatever weights, each time from the same noise: what training shows and measures.

    Attributes:
      sampler: of `make_sampler`.
      autoencoder: what decodes; None where images are drawn, or latents are to be shown as they are.
      conditions: of the images.
      key: of the noise.
      count: of images.
      devices: that share a batch.
      pictures: that they fill, as the sampler knows; None where all is drawn.
      progress: called after each batch.
    """

    sampler: Callable[..., jax.Array]
    autoencoder: Autoencoder | None
    conditions: Conditions
    key: jax.Array
    count: int
    devices: int
    progress: Callable[[], None] = lambda: None
    pictures: Pictures | None = None

    def draw(self, params, batch: int) -> Iterator[np.ndarray]:
        """uint8 [batch, H, W, C] each, the last one smaller; batches are rounded up to what the devices divide."""
        batch += -batch % self.devices
        for i, images in draw_batches(self.sampler, params, self.key, self.conditions, self.count, batch, self.autoencoder):
            self.progress()
            drawn = to_uint8(images[: self.count - i * batch])
            yield self.pictures.composite(i * batch, drawn) if self.pictures else drawn
