"""One run: training, and what is measured on the way. Everything that a continuation needs is in its checkpoints."""

import dataclasses
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speedup.data import ImageSet
from benchmarks.speedup.judge import Judge, digest
from benchmarks.speedup.plan import EVALUATION_SEED, SCALES, SLOW_EMA, Piece, Scale, make_config
from benchmarks.teacher import features_of
from speedit_jax import __version__, sharding
from speedit_jax.data.features import FeaturedSource
from speedit_jax.data.sources import ArraySource
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.sampling.conditions import Labels
from speedit_jax.sampling.sampler import FixedSamples, Settings, image_noise, make_sampler
from speedit_jax.storage import write_json
from speedit_jax.training import run
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.batches import batches
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.finetune import start_from, starting_weights

SAVE_SECONDS = 180  # between two checkpoints, at most, and a step


class HeldOut:
    """The mse of the noise on held-out images, by quarter of the schedule, at timesteps and noise that never change.

    It is the mse of the noise whatever the network predicts, unweighted, and not what a strategy minimises. A flow's times are
    those in the middle of its levels, whose signal-to-noise ratios are not those of the diffusion.
    """

    def __init__(self, parts: Assembly, source: ArraySource, count: int):
        count = min(count, len(source)) // 4 * 4
        rng, num_steps = np.random.default_rng(EVALUATION_SEED), parts.diffusion.schedule.num_steps
        rows = rng.permutation(len(source))[:count]
        self._x0, self._labels = source.images[rows], source.labels[rows]
        self._t = ((np.arange(count) + rng.uniform(size=count)) * num_steps / count).astype(np.int32)  # stratified
        self._noise = rng.standard_normal(self._x0.shape, dtype=np.float32)
        self.digest = digest(self._x0, self._labels, self._t, self._noise)
        self._mesh, diffusion, model = parts.mesh, parts.diffusion, parts.model

        def error(params, x0, labels, t, noise):
            flow = isinstance(diffusion, FlowMatching)
            t = 1 - (t + 0.5) / num_steps if flow else t
            x_t = diffusion.q_sample(x0, t, noise)
            output = model.apply(params, x_t, diffusion.model_time(t), labels)
            estimate = diffusion.velocity_and_noise if flow else diffusion.predict_x0_and_eps
            return ((estimate(output, x_t, t)[1] - noise) ** 2).mean((1, 2, 3))

        self._error = jax.jit(error)

    def mse(self, params) -> list[float]:
        """Of each quarter, from the least noise to the most."""
        with jax.set_mesh(self._mesh):
            parts = [
                self._error(params, *(x[i : i + 128] for x in (self._x0, self._labels, self._t, self._noise)))
                for i in range(0, len(self._t), 128)
            ]
        return [float(quarter.mean()) for quarter in np.split(np.concatenate(parts), 4)]


def fixed_samples(parts: Assembly, classes: int, count: int) -> FixedSamples:
    """The first `count` images of an evaluation, of each class in turn."""
    settings = Settings.from_config(parts.config.sampling, parts.model)
    sampler = make_sampler(parts.model, parts.diffusion, settings, parts.mesh)
    return FixedSamples(
        sampler, None, Labels(np.arange(classes)), jax.random.key(EVALUATION_SEED), count, sharding.batch_devices(parts.mesh)
    )


class Evaluation:
    """What weights are worth: the judge's opinion of their samples, and the held-out mse."""

    def __init__(self, parts: Assembly, images: ImageSet, judge: Judge, scale: Scale):
        self._classes, self._judge = len(images.train.class_names), judge
        self._samples = fixed_samples(parts, self._classes, scale.num_images)
        self._held_out = HeldOut(parts, images.held_out, scale.held_out)
        first = image_noise(jax.random.key(EVALUATION_SEED), jnp.arange(scale.num_images), 0, parts.model.image_shape)
        self.record = {
            "noise_digest": digest(np.asarray(first)),
            "held_out_digest": self._held_out.digest,
            "network_evaluations": scale.num_images * scale.sampler_steps,
        }

    def __call__(self, params) -> dict:
        drawn = np.concatenate(list(self._samples.draw(params, 100)))
        images = drawn.astype(np.float32) / np.float32(127.5) - 1
        labels = np.arange(len(images)) % self._classes
        return {**self._judge.score(images, labels), "mse": self._held_out.mse(params)}


def commit() -> str:
    """Of the code; "+" where files of the code differ from it."""
    root = Path(__file__).resolve().parents[2]
    code = ["--", "speedit_jax", "benchmarks"]
    calls = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", *code])
    found = [subprocess.run(["git", *call], cwd=root, capture_output=True, text=True).stdout.strip() for call in calls]
    return found[0] + ("+" if found[1] else "")


class Taught:
    """The features that a teacher of the images' labels makes of them, at each patch of 4 pixels."""

    def __init__(self, images: ImageSet):
        self._features = features_of(images.train, strides=(2, 2, 1), epochs=5)
        self.shape, self.checksum = self._features.shape[1:], digest(self._features)
        self.identity = {"encoder": "benchmarks/teacher.py"}

    def read(self, index: int, mirrored: bool) -> np.ndarray:
        return self._features[index]


class Run:
    """A piece on its way: what has been measured of it, and how it goes on."""

    def __init__(self, piece: Piece, images: ImageSet, judge: Judge, workdir: Path):
        self.piece, self.scale, self.config = piece, SCALES[piece.scale], make_config(piece)
        aligned = self.config.regularizer.align_target == "features"
        self._train = FeaturedSource(images.train, Taught(images)) if aligned else images.train
        mesh = sharding.make_mesh(self.config.mesh)
        self.parts = assemble(self.config, self._train, mesh)
        self._evaluate = Evaluation(self.parts, images, judge, self.scale)
        self._meta = run.describe(self.config, self._train, self.parts.model.image_shape, None)
        run.claim(workdir, self._meta)
        self._checkpoints = Checkpoints(workdir, create=True)
        self.key = jax.random.key(self.config.seed)
        self.step = self._checkpoints.latest() or 0
        self._fixed = {
            "piece": dataclasses.asdict(piece),
            "scale": dataclasses.asdict(self.scale),
            "judge": judge.identity,
            "evaluation": self._evaluate.record,
            "parameters": sum(x.size for x in jax.tree.leaves(self.parts.shapes.params)),
        }
        if self.step:
            self.state = self._checkpoints.restore(self.step, self.parts.shapes, self.parts.shardings)
            self.progress = self._checkpoints.meta(self.step)["speedup"]
        else:
            self.state = self.parts.initial_state(self.key)
            if self.config.init_from:
                before = workdir.with_name(dataclasses.replace(piece, strategy=self.config.init_from).name)
                weights, _ = starting_weights(str(before), self.parts, images.train.class_names)
                self.state = start_from(self.state, weights)
            weights = digest(*(np.asarray(x) for x in jax.tree.leaves(self.state.params)))
            self.progress = {"initial_weights": weights, "data_digest": "", "train_seconds": 0.0, "rows": [], "sessions": []}
        self.progress["sessions"].append(
            {
                "from_step": self.step,
                "commit": commit(),
                "speedit_jax": __version__,
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }
        )

    @property
    def complete(self) -> bool:
        return self.step >= self.num_steps

    @property
    def num_steps(self) -> int:
        return self.config.training.num_steps

    def save(self) -> None:
        self._checkpoints.save(self.step, self.state, self._meta | {"speedup": self.progress})
        self._checkpoints.wait()

    def record(self) -> dict:
        """What is written to docs/results."""
        return {"complete": self.complete, "step": self.step, **self._fixed, **self.progress}

    def measure(self, loss: float) -> None:
        weights = {"ema": self.state.ema}
        if self.step % self.scale.evaluate_all_every == 0 or self.complete:
            weights |= {"slow_ema": self.state.extra_ema[str(SLOW_EMA)], "raw": self.state.params}
        row = {"step": self.step, "images_trained_on": self.step * self.scale.batch_size, "loss": loss}
        every = self.parts.strategy.probe_every
        row["probes"] = -(-self.step // every) if every else 0  # each costs the gradients of one more batch
        row["data_digest"], row["train_seconds"] = self.progress["data_digest"], self.progress["train_seconds"]
        row["weights"] = {name: self._evaluate(params) for name, params in weights.items()}
        self.progress["rows"].append(row)

    def advance(self, stop: Callable[[int], bool], out: Path) -> None:
        """Goes on to the end, or until `stop` says so; then all is saved, too.

        Args:
          out: JSON, written after each evaluation.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, self.record())  # a run that was stopped between its last checkpoint and this is complete now
        train_step, saved = self.parts.jit_step(), time.monotonic()
        since = time.perf_counter()
        for batch in batches(self.parts, self._train, self.step, self.num_steps):
            self.progress["data_digest"] = digest(batch["image"], batch["label"], start=self.progress["data_digest"])
            with jax.set_mesh(self.parts.mesh):
                self.state, metrics = train_step(self.state, batch, self.key)
            self.step += 1
            measuring, stopping = self.step % self.scale.evaluate_every == 0 or self.complete, stop(self.step)
            if measuring or stopping or time.monotonic() - saved > SAVE_SECONDS:
                loss = float(metrics["loss"])
                self.progress["train_seconds"] += time.perf_counter() - since
                if measuring:
                    self.measure(loss)
                self.save()
                if measuring:
                    write_json(out, self.record())
                saved, since = time.monotonic(), time.perf_counter()
            if stopping:
                break
        self._checkpoints.close()
