r"""The held-out loss: the unweighted mse of fixed examples at fixed timesteps with fixed noise.

  (1)  mse = mean over examples n and j = 0..3 of the mse of gaussian.py, eq. (4), or of flow.py, eq. (3)
       at u_nj = (j N + p_n + 1/2) / 4N;  t = floor(u T) of diffusion, s = 1 - u of a flow

The N examples are evenly spaced over their source, and p is a fixed permutation of 0..N-1. All u together are evenly spaced over
the schedule, and each example has one in each quarter. Noise and, for latents, the draw from the posterior depend on
(evaluation.seed, n, j) alone. So the number depends, to rounding, on weights and data only, and not on strategy, mesh or batches.
Runs can be compared by it. They cannot be compared by the mean of their own training mse, which a timestep strategy moves. The
network is told the labels, or the first caption of each example, which are never dropped.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from speedit_jax import sharding
from speedit_jax.data import loader
from speedit_jax.data.image_sets import EvenlySpaced
from speedit_jax.data.joined import alone
from speedit_jax.data.sources import Source, open_source
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.errors import UserError
from speedit_jax.models.vae import VaeConfig, to_latents
from speedit_jax.sampling.sampler import image_noise
from speedit_jax.training.assembly import Assembly
from speedit_jax.training.changes import same_encoder

LEVELS = 4  # noise levels of each example


def levels(count: int, seed: int) -> np.ndarray:
    """u of eq. (1), float64 [LEVELS, count], in (0, 1): 0 is clean."""
    order = np.random.default_rng(seed).permutation(count)
    return (np.arange(LEVELS)[:, None] * count + order + 0.5) / (LEVELS * count)


class HeldOutLoss:
    """Measures weights on the examples of the config's evaluation.loss_* keys.

    Args:
      parts: of the run.
      source: what it trains on.

    Raises:
      UserError: the examples cannot be read, or do not fit the run.
    """

    def __init__(self, parts: Assembly, source: Source):
        section = parts.config.evaluation
        self._parts = parts
        self._source = _open_source(parts.config, source)
        _check_fits(parts, self._source, source)
        self._count = min(section.loss_images, len(self._source))
        self._seen = alone(self._source).fingerprint == alone(source).fingerprint
        self._levels = levels(self._count, section.seed)
        num_steps = parts.diffusion.schedule.num_steps
        steps = np.floor(self._levels * num_steps).astype(np.int32)
        self._quarters = 4 * steps // num_steps
        self._times = (1 - self._levels).astype(np.float32) if isinstance(parts.diffusion, FlowMatching) else steps
        self._measure = _jit_measure(parts, jax.random.key(section.seed))

    def __str__(self) -> str:
        section, data = self._parts.config.evaluation, self._parts.config.data
        where = section.loss_source or data.source
        split = f" ({section.loss_split})" if section.loss_split else ""
        said = ": these are training examples, not held out (evaluation.loss_source, evaluation.loss_split)" if self._seen else ""
        return (
            f"every {section.loss_every:,} steps the mse of {self._count:,} examples of {where}{split} at {LEVELS} noise levels"
            f" each{said}"
        )

    def prepare(self) -> None:
        """Loads the examples, and encodes images where the model learns latents; they stay on the devices."""
        parts, rows = self._parts, self._parts.rows
        batch = min(parts.config.evaluation.batch_size, self._count)
        batch += -batch % sharding.batch_devices(parts.mesh)
        self._batches, first = [], 0
        for records in loader.in_order(EvenlySpaced(self._source, self._count), 0, self._count, batch, parts.config.data.threads):
            # The last batch is filled up, so that one compilation serves.
            here = len(records["label"])
            which = np.arange(batch) % here
            if "moments" in records:
                data = sharding.from_host(rows, records["moments"][which, 0])  # of the image, not of its mirror image
            else:
                data = sharding.from_host(rows, records["image"][which])
                data = parts.autoencoder.moments(data) if parts.encoded_by else data
            indices = (first + which).astype(np.int32)
            y = records["text"] if parts.model.text else records["label"].astype(np.int32)
            y = jax.tree.map(lambda x, which=which: sharding.from_host(rows, x[which]), y)
            times = jax.device_put(self._times[:, indices], sharding.replicated(parts.mesh))
            self._batches.append((here, sharding.from_host(rows, indices), data, y, times))
            first += here

    def __call__(self, params) -> dict[str, float]:
        """{"mse", "mse_q1" (the least noisy quarter of the schedule), ..., "mse_q4"} of some weights, after `prepare`."""
        found = []
        with jax.set_mesh(self._parts.mesh):
            drawn = [(here, self._measure(params, *batch)) for here, *batch in self._batches]
        for here, values in drawn:
            found.append(np.asarray(values, np.float64)[:, :here])
        mse = np.concatenate(found, axis=1)
        by_quarter = {f"mse_q{q + 1}": float(mse[self._quarters == q].mean()) for q in range(4) if (self._quarters == q).any()}
        return {"mse": float(mse.mean())} | by_quarter


def _jit_measure(parts: Assembly, key: jax.Array):
    """measure(params, indices [B], images or moments [B, ...], y, times [LEVELS, B]) -> mse [LEVELS, B], replicated."""
    model, diffusion, encoded_by = parts.model, parts.diffusion, parts.encoded_by
    config = encoded_by and VaeConfig.from_diffusers(encoded_by["config"])

    def measure(params, indices, data, y, times):
        def noise(stream):
            return image_noise(key, indices, stream, model.image_shape)

        def one(j):
            x0 = data
            if encoded_by:
                mean, logvar = jnp.split(data, 2, axis=-1)
                x0 = to_latents(config, mean + jnp.exp(0.5 * logvar) * noise(LEVELS + j))
            t, eps = times[j], noise(j)
            x_t = sharding.constrain(diffusion.q_sample(x0, t, eps), ("batch", None, None, None))
            output = model.apply(params, x_t, diffusion.model_time(t), y)
            return diffusion.losses(output, x0, x_t, t, eps)["mse"]

        return jax.lax.map(one, jnp.arange(LEVELS))

    return jax.jit(measure, out_shardings=sharding.replicated(parts.mesh))


def _open_source(config: ml_collections.ConfigDict, source: Source) -> Source:
    """The examples' source: what evaluation.loss_source and loss_split name, by default what the run trains on."""
    section = config.evaluation
    if not section.loss_source and not section.loss_split:
        if section.loss_text:
            raise UserError(
                f"evaluation.loss_text={section.loss_text} is of evaluation.loss_source or loss_split, neither of which is set;"
                " the run's own examples have data.text"
            )
        return source
    data = config.data.copy_and_resolve_references()
    data.source = section.loss_source or data.source
    data.text, data.features = section.loss_text, ""
    data.split = section.loss_split or ("train" if section.loss_source else data.split)
    try:
        return open_source(data)
    except UserError as e:
        raise UserError(f"evaluation.loss_source={section.loss_source}, evaluation.loss_split={section.loss_split}: {e}") from e


def _check_fits(parts: Assembly, examples: Source, source: Source) -> None:
    """Raises a UserError for examples that are not of the run's kind."""
    name = f"evaluation.loss_source={parts.config.evaluation.loss_source}"
    if parts.texts:
        texts = getattr(examples, "texts", None)
        if texts is None:
            raise UserError(f"{name}: this run is on text; set evaluation.loss_text to the encoded captions of these")
        if not same_encoder(texts.identity, parts.texts.identity):
            raise UserError(f"evaluation.loss_text={parts.config.evaluation.loss_text}: has captions of another text encoder")
    elif source.class_names and tuple(examples.class_names) != tuple(source.class_names):
        raise UserError(f"{name}: its classes differ from those of data.source={parts.config.data.source}")
    if examples.encoded_by and (examples.encoded_by["weights"] != (parts.encoded_by or {}).get("weights")):
        raise UserError(f"{name}: has latents of another autoencoder")
    shape = examples.image_shape
    if not examples.encoded_by and parts.encoded_by:
        if not parts.autoencoder:
            raise UserError(f"{name}: these are images, but the run trains on latents; set data.vae to its autoencoder")
        shape = parts.autoencoder.latent_shape(shape)
    if tuple(shape) != tuple(parts.model.image_shape):
        sizes = ["x".join(map(str, of)) for of in (shape, parts.model.image_shape)]
        raise UserError(f"{name}: has {sizes[0]}, but the run trains on {sizes[1]}")
