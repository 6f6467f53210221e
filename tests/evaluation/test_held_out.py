"""The held-out loss: its definition, computed directly, and that nothing else moves it."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny
from errors import assert_one_line

from speedit_jax.data.features import FeaturedSource
from speedit_jax.data.sources import ArraySource, load_digits, open_source
from speedit_jax.evaluation.held_out import LEVELS, HeldOutLoss, levels
from speedit_jax.models.vae import VaeConfig, to_latents
from speedit_jax.sampling.sampler import image_noise

COUNT = 12
DIGITS = {"data__source": "digits", "evaluation__loss_every": 1, "evaluation__loss_images": COUNT}
DIGITS |= {"evaluation__loss_split": "held_out", "evaluation__batch_size": 8}


def held_out(shape=tiny.ONE, source=None, **changes):
    """(HeldOutLoss after prepare, its trainer)."""
    trainer = tiny.make_trainer(shape, **DIGITS | changes)
    measured = HeldOutLoss(trainer, source or open_source(trainer.config.data))
    measured.prepare()
    return measured, trainer


def weights(trainer):
    return jax.device_put(tiny.random_like(trainer.shapes.params), trainer.shardings.params)


def direct(trainer, params, images, labels):
    """The definition in float64, one example and one level after another; only the network is float32."""
    diffusion, num_steps = trainer.diffusion, trainer.diffusion.schedule.num_steps
    key, flow, parts = jax.random.key(trainer.config.evaluation.seed), hasattr(diffusion, "path"), [[], [], [], []]
    for n, (image, label) in enumerate(zip(images.astype(np.float64), labels, strict=True)):
        for j in range(LEVELS):
            u = levels(COUNT, trainer.config.evaluation.seed)[j, n]
            noise = np.asarray(image_noise(key, np.array([n]), j, tiny.IMAGE)[0], np.float64)
            t = int(u * num_steps)
            if flow:
                signal, sigma, time, target = 1 - u, u, 1 - u, image - noise  # of the linear path
            else:
                abar = np.cumprod(1 - diffusion.schedule.betas)[t]
                signal, sigma, time, target = abar**0.5, (1 - abar) ** 0.5, t, noise
            x_t = (signal * image + sigma * noise).astype(np.float32)
            out = trainer.model.apply(params, x_t[None], np.array([time], np.float32 if flow else np.int32), np.array([label]))
            parts[4 * t // num_steps].append(((target - np.asarray(out, np.float64)[0, ..., :1]) ** 2).mean())
    return {"mse": np.mean(np.concatenate(parts))} | {f"mse_q{q + 1}": np.mean(part) for q, part in enumerate(parts)}


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_it_is_its_definition(path):
    measured, trainer = held_out(diffusion__path=path)
    params = weights(trainer)
    images, labels = load_digits("held_out")
    chosen = np.arange(COUNT) * len(images) // COUNT
    expected = direct(trainer, params, images[chosen], labels[chosen])
    found = measured(params)
    assert list(found) == ["mse", "mse_q1", "mse_q2", "mse_q3", "mse_q4"]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)  # float32 networks


def test_levels_are_evenly_spaced_and_each_example_has_one_in_each_quarter():
    u = levels(37, 3)
    np.testing.assert_allclose(np.sort(u.ravel()), (np.arange(37 * LEVELS) + 0.5) / (37 * LEVELS), rtol=1e-12)
    assert (np.floor(4 * u) == np.arange(4)[:, None]).all()
    # Of examples that are sorted by class, no class has the clean ends of the quarters.
    assert abs(np.corrcoef(u[0], np.arange(37))[0, 1]) < 0.5


def test_mesh_batch_and_strategy_do_not_move_it():
    measured, trainer = held_out()
    expected = measured(weights(trainer))
    others = [
        ((2, 2, 2), {}),
        ((8, 1, 1), {"evaluation__batch_size": 64}),
        (tiny.ONE, {"evaluation__batch_size": 5}),
        (tiny.ONE, {"timesteps__strategy": "uniform", "training__batch_size": 32, "data__flip": True}),
    ]
    for shape, changes in others:
        measured, trainer = held_out(shape, **changes)
        found = measured(weights(trainer))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=f"{shape} {changes} {name}")
    measured, trainer = held_out(evaluation__seed=1)
    assert measured(weights(trainer))["mse"] != expected["mse"]


@dataclasses.dataclass(frozen=True)
class Moments(ArraySource):
    """Stored latents: the moments of an image and, spoiled, of its mirror image."""

    @property
    def encoded_by(self):
        return {"vae": "v", "weights": "w", "config": dataclasses.asdict(VaeConfig(latent_channels=1, scaling_factor=0.5))}

    @property
    def image_shape(self):
        return tiny.IMAGE

    def __getitem__(self, index):
        image = self.images[index]
        moments = np.concatenate([image, image - 3], axis=-1)
        return {"moments": np.stack([moments, np.full_like(moments, np.nan)]), "label": self.labels[index]}


def test_latents_are_drawn_from_the_posterior_with_fixed_noise():
    images, labels = load_digits("held_out")
    source = Moments(images, labels, tuple(map(str, range(10))), "f")
    trainer = dataclasses.replace(tiny.make_trainer(**DIGITS | {"evaluation__loss_split": ""}), encoded_by=source.encoded_by)
    measured = HeldOutLoss(trainer, source)
    measured.prepare()
    params = weights(trainer)
    found = measured(params)
    chosen = np.arange(COUNT) * len(images) // COUNT
    key, total = jax.random.key(0), []
    for j in range(LEVELS):
        posterior = np.asarray(image_noise(key, np.arange(COUNT), LEVELS + j, tiny.IMAGE))
        x0 = to_latents(
            VaeConfig.from_diffusers(source.encoded_by["config"]), images[chosen] + np.exp((images[chosen] - 3) / 2) * posterior
        )
        t = np.floor(levels(COUNT, 0)[j] * 1000).astype(int)
        noise = image_noise(key, np.arange(COUNT), j, tiny.IMAGE)
        x_t = trainer.diffusion.q_sample(x0, t, noise)
        out = trainer.model.apply(params, x_t, t, labels[chosen])
        total.append(((np.asarray(noise) - np.asarray(out)[..., :1]) ** 2).mean())
    np.testing.assert_allclose(found["mse"], np.mean(total), rtol=1e-5)


def test_training_examples_are_called_that():
    assert "not held out" not in str(held_out()[0])
    for split in ("", "train"):
        assert "these are training examples, not held out" in str(held_out(evaluation__loss_split=split)[0])
    # Features are read in training alone, and the examples are the same with them.
    source = FeaturedSource(open_source(tiny.make_config(**DIGITS).data), types.SimpleNamespace(checksum="f"))
    assert "these are training examples" in str(held_out(source=source, evaluation__loss_split="train")[0])
    assert "not held out" not in str(held_out(source=source)[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"evaluation__loss_split": "test"}, ["evaluation.loss_split=test", "held_out"]),
        ({"evaluation__loss_source": "folder:/no/such", "evaluation__loss_split": ""}, ["evaluation.loss_source", "/no/such"]),
        ({"evaluation__loss_source": "synthetic", "evaluation__loss_split": ""}, ["evaluation.loss_source=synthetic", "classes"]),
        ({"evaluation__loss_text": "/no/such", "evaluation__loss_split": ""}, ["evaluation.loss_text=/no/such", "loss_source"]),
        ({"evaluation__loss_images": 0}, ["evaluation.loss_images=0"]),
        ({"evaluation__loss_every": -1}, ["evaluation.loss_every=-1"]),
    ],
)
def test_a_mistake_is_one_line(changes, words):
    assert_one_line(lambda: held_out(**changes), *words)
