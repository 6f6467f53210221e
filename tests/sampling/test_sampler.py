"""Sampling: image number i of a seed is one image, whatever the batch and the devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from tiny import CLASSES, IMAGE, ONE

from speedit_jax import sharding
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.errors import UserError
from speedit_jax.sampling.labels import parse_labels, random_labels
from speedit_jax.sampling.sampler import Settings, check_given, image_noise, make_sampler, resolve

KEY = jax.random.key(5)
EIGHT = (8, 1, 1)
INDICES = np.arange(8)
LABELS = INDICES % 3

# Ancestral, so that noise is drawn at every step, and guided.
SETTINGS = Settings(sampler="ddpm", num_steps=4, eta=0.0, guidance_scale=2.0, guidance_channels=0, clip=True)
# With a carry from step to step, and steps with and without guidance.
MULTISTEP = dataclasses.replace(SETTINGS, sampler="dpm++", guidance_schedule="cosine", guidance_low=0.2, guidance_high=0.8)


@functools.cache
def sampler(shape, settings=SETTINGS):
    """run(indices, labels) -> images, with random weights, sharded as in training."""
    trainer = tiny.make_trainer(shape)
    params = jax.device_put(tiny.random_like(trainer.shapes.params), trainer.shardings.params)
    run = make_sampler(trainer.model, trainer.diffusion, settings, trainer.mesh)
    return lambda indices, labels, key=KEY: run(params, key, indices, labels)


def test_samples():
    images = sampler(EIGHT)(INDICES, LABELS)
    assert images.is_fully_replicated
    assert images.shape == (8, *IMAGE) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 and np.std(images) > 0.1


def test_a_seed_gives_the_same_bits_again():
    first = sampler(EIGHT)(INDICES, LABELS)
    tiny.assert_same(sampler(EIGHT)(INDICES, LABELS), first)
    assert np.abs(sampler(EIGHT)(INDICES, LABELS, jax.random.key(6)) - first).max() > 0.1


# Rounding, 6e-8, times 157 = 1 / sqrt(abar) of the first step, where x0 is predicted from nearly pure noise.
@pytest.mark.parametrize("shape", [EIGHT, (2, 2, 2)], ids=str)
def test_devices_change_only_the_rounding(shape):
    np.testing.assert_allclose(sampler(shape)(INDICES, LABELS), sampler(ONE)(INDICES, LABELS), rtol=0, atol=1e-4)


def test_devices_change_only_the_rounding_of_steps_with_and_without_guidance():
    one, eight = (sampler(shape, MULTISTEP)(INDICES, LABELS) for shape in (ONE, (2, 2, 2)))
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-4)


def test_guidance_by_a_weaker_model():
    """By itself it changes nothing; by another one, images; and it needs no null label."""
    trainer = tiny.make_trainer(model__label_dropout=0.0)
    own, weaker = (tiny.random_like(trainer.shapes.params, seed) for seed in (0, 1))
    unguided = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    plain = make_sampler(trainer.model, trainer.diffusion, unguided, trainer.mesh)(own, KEY, INDICES, LABELS)
    run = make_sampler(trainer.model, trainer.diffusion, SETTINGS, trainer.mesh, guide=trainer.model)
    np.testing.assert_allclose(run((own, own), KEY, INDICES, LABELS), plain, rtol=0, atol=1e-5)
    assert np.abs(run((own, weaker), KEY, INDICES, LABELS) - plain).max() > 1e-2


def test_an_image_does_not_depend_on_its_batch():
    images = sampler(ONE)(INDICES, LABELS)
    later = sampler(ONE)(INDICES + 4, (INDICES + 4) % 3)
    np.testing.assert_allclose(later[:4], images[4:], rtol=0, atol=1e-5)
    few = sampler(ONE)(INDICES[2:5], LABELS[2:5])
    np.testing.assert_allclose(few, images[2:5], rtol=0, atol=1e-4)  # another batch size is another program


def test_images_go_with_their_index_and_label():
    images = sampler(EIGHT)(INDICES, LABELS)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(sampler(EIGHT)(INDICES[order], LABELS[order]), images[order], rtol=0, atol=1e-5)
    other = sampler(EIGHT)(INDICES, (LABELS + np.arange(8) % 2) % CLASSES)
    changed = np.abs(other - images).max(axis=(1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True] * 4


@functools.cache
def noise(shape):
    """draw(indices, stream) -> noise, sharded over a mesh and back."""
    rows = sharding.batch_sharding(tiny.make_mesh(shape))
    draw = jax.jit(lambda indices, stream: image_noise(KEY, indices, stream, IMAGE), out_shardings=rows)
    return lambda indices, stream=0: np.asarray(draw(jax.device_put(indices, rows), stream))


def test_noise_is_equal_to_the_bit_on_any_devices_and_in_any_batch():
    whole = noise(ONE)(np.arange(16))
    for shape in (EIGHT, (2, 2, 2)):
        tiny.assert_same(noise(shape)(np.arange(16)), whole)
        tiny.assert_same(noise(shape)(np.arange(4, 20))[:12], whole[4:])
    assert len(np.unique(whole)) > 0.99 * whole.size
    assert np.abs(noise(ONE)(np.arange(16), stream=1) - whole).max() > 1
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=5 / whole.size**0.5)


def test_random_labels_are_uniform_and_go_with_their_index():
    labels = random_labels(KEY, 10_000, 7)
    assert labels.dtype == np.int32
    tiny.assert_same(random_labels(KEY, 100, 7), labels[:100])
    assert (random_labels(jax.random.key(6), 100, 7) != labels[:100]).any()
    # Chi squared of six degrees of freedom: above 38 once in a million.
    counts = np.bincount(labels, minlength=7)
    assert len(counts) == 7 and ((counts - 10_000 / 7) ** 2 / (10_000 / 7)).sum() < 38
    # Neighbours say nothing of each other.
    assert abs((labels[1:] == labels[:-1]).mean() - 1 / 7) < 5 * (6 / 49 / 10_000) ** 0.5


def test_settings_come_from_the_config():
    config = tiny.make_config(sampling__num_steps=7, sampling__guidance_channels=3).sampling
    guided = tiny.make_trainer().model
    assert Settings.from_config(config, guided) == Settings("auto", 7, 0.0, 1.5, 3, True)
    unguided = dataclasses.replace(guided, null_label=None, guidable=False)
    assert Settings.from_config(config, unguided) == Settings("auto", 7, 0.0, 1.0, 3, True)
    assert Settings.from_config(config, unguided, guided).guidance_scale == 1.5


def test_each_kind_has_its_samplers():
    auto = dataclasses.replace(SETTINGS, sampler="auto")
    gaussian, flow = tiny.make_trainer().diffusion, FlowMatching("linear")
    assert resolve(auto, gaussian).sampler == "ddim" and resolve(auto, flow).sampler == "euler"
    assert resolve(SETTINGS, gaussian) == SETTINGS
    with pytest.raises(
        UserError, match=r"unknown sampler 'ddpm' for a flow \(diffusion.path=linear\); choose one of auto, euler"
    ):
        resolve(SETTINGS, flow)


def test_flows_are_sampled_with_guidance_in_an_interval():
    trainer = tiny.make_trainer(diffusion__path="linear")
    params = jax.device_put(tiny.random_like(trainer.shapes.params), trainer.shardings.params)
    drawn = {}
    for low, high in ((0.0, 1.0), (0.0, 0.5)):
        settings = dataclasses.replace(SETTINGS, sampler="sde", guidance_low=low, guidance_high=high)
        run = make_sampler(trainer.model, trainer.diffusion, settings, trainer.mesh)
        drawn[high - low] = run(params, KEY, INDICES, LABELS)
        assert np.isfinite(drawn[high - low]).all()
    # Of four steps two are noisier than half.
    unguided = make_sampler(
        trainer.model, trainer.diffusion, dataclasses.replace(SETTINGS, sampler="sde", guidance_scale=1.0), trainer.mesh
    )
    plain = unguided(params, KEY, INDICES, LABELS)
    assert np.abs(drawn[1.0] - drawn[0.5]).max() > 1e-3 and np.abs(drawn[0.5] - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: must be 0 or more"),
        ({"guidance_channels": 2}, r"guidance_channels=2: must lie in 0..1"),
        ({"guidance_channels": -1}, r"guidance_channels=-1: must lie in 0..1"),
        ({"eta": 1.5}, r"eta=1.5: must lie in \[0, 1\]"),
        ({"eta": -0.5}, r"eta=-0.5: must lie in \[0, 1\]"),
        ({"sampler": "heun"}, "unknown sampler 'heun' for diffusion; choose one of auto, ddpm, ddim, dpm"),
        ({"spacing": "karras"}, "unknown spacing 'karras'; choose one of even, logsnr"),
        ({"guidance_schedule": "sine"}, "unknown guidance_schedule 'sine'"),
        ({"guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low=0.8, guidance_high=0.2: must be"),
        ({"num_steps": 0}, "0 sampling steps asked for"),
        ({"num_steps": 1001}, "1001 sampling steps asked for"),
    ],
    ids=str,
)
def test_errors_come_before_sampling(changes, message):
    trainer = tiny.make_trainer()
    with pytest.raises(UserError, match=message):
        make_sampler(trainer.model, trainer.diffusion, dataclasses.replace(SETTINGS, **changes), trainer.mesh)


def test_sections_of_steps_are_settings_like_others():
    """JSON makes a list of them, and what a run from Python has drawn is remembered by its settings."""
    config = tiny.make_config(sampling__num_steps=[2, 3])
    settings = Settings.from_config(config.sampling, tiny.make_trainer().model)
    assert {settings: 1}[dataclasses.replace(settings, num_steps=(2, 3))] == 1
    assert dataclasses.replace(settings, num_steps=[2, 3]) == settings


@pytest.mark.parametrize(
    ("sampler", "given", "message"),
    [
        ("ddpm", {"eta": 0.0}, "eta=0.0 is noise of ddim and dpm.., not of ddpm"),
        ("euler", {"eta": 0.5, "spacing": None}, "eta=0.5 is noise of ddim and dpm.., not of euler"),
        ("sde", {"spacing": "logsnr"}, "spacing=logsnr is for diffusion"),
        ("heun", {"spacing": "karras"}, "spacing=karras is for diffusion"),
    ],
    ids=str,
)
def test_what_a_sampler_does_not_look_at_is_refused(sampler, given, message):
    with pytest.raises(UserError, match=message):
        check_given(given, dataclasses.replace(SETTINGS, sampler=sampler))


@pytest.mark.parametrize(
    "given",
    [
        {"guidance_channels": 1},
        {"guidance_schedule": "linear"},
        {"guidance_low": 0.2},
        {"guidance_high": 0.8},
        {"sparse_weak": 0.5},
    ],
    ids=str,
)
def test_what_only_guidance_looks_at_is_refused_without_it(given):
    """A model that cannot be guided has a scale of 1, too, where none is given."""
    (name,) = given
    plain = Settings.from_config(tiny.make_config().sampling, tiny.make_trainer(model__label_dropout=0.0).model)
    with pytest.raises(UserError, match=f"{name}=.* has no effect without guidance"):
        check_given(given, dataclasses.replace(plain, **given))
    check_given(given, dataclasses.replace(SETTINGS, **given))


def test_what_a_sampler_looks_at_is_not_refused():
    for sampler in ("ddim", "dpm++"):
        check_given({"eta": 1.0, "spacing": "logsnr"}, dataclasses.replace(SETTINGS, sampler=sampler))
    check_given({"spacing": "logsnr", "eta": None}, dataclasses.replace(SETTINGS, sampler="ddpm"))
    check_given({"spacing": "even"}, dataclasses.replace(SETTINGS, sampler="euler"))
    unguided = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    check_given({"guidance_low": 0.0, "guidance_high": None, "guidance_schedule": "constant"}, unguided)
    check_given({"sparse_weak": 0.9}, dataclasses.replace(unguided, sparse_strong=0.5, sparse_weak=0.9))


def test_guidance_needs_a_null_label():
    trainer = tiny.make_trainer(model__label_dropout=0.0)
    assert trainer.model.null_label is None
    with pytest.raises(
        UserError,
        match=r"guidance_scale=2.0 needs a model trained with classes or text and model.label_dropout > 0; use guidance_scale=1",
    ):
        make_sampler(trainer.model, trainer.diffusion, SETTINGS, trainer.mesh)
    make_sampler(trainer.model, trainer.diffusion, dataclasses.replace(SETTINGS, guidance_scale=1.0), trainer.mesh)


def test_a_class_is_a_name_before_it_is_a_number():
    assert parse_labels(["10", "1", "cat"], ["cat", "10", "2"]).tolist() == [1, 1, 0]
    assert parse_labels(None, ["cat", "10", "2"]).tolist() == [0, 1, 2]


def test_a_name_of_two_classes_is_refused():
    """As "crane" is in ImageNet: a bird and a machine."""
    names = ["crane", "cat", "crane"]
    assert parse_labels(["cat", "2"], names).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"the classes 0, 2 are all called 'crane'; give the number"):
        parse_labels(["crane"], names)
