"""What the diffusion model trains on: samples of the posterior, scaled."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from errors import assert_one_line

from speedit_jax import sharding
from speedit_jax.encoders.autoencoder import Autoencoder, latents_of, sample_posterior, scale_warning, scaled_statistics
from speedit_jax.testing.vae_weights import CONFIGS, write_vae
from speedit_jax.training.inputs import stream
from speedit_jax.training.step import make_train_step

IDENTITY = {"vae": "", "weights": "", "config": {"scaling_factor": 0.5, "shift_factor": 0.25, "block_out_channels": [32]}}


def test_samples_have_the_moments():
    mean, std = jnp.array([-2.0, 0.0, 3.0]), jnp.array([0.1, 1.0, 4.0])
    moments = jnp.broadcast_to(jnp.concatenate([mean, 2 * jnp.log(std)]), (100_000, 1, 1, 6))
    samples = np.asarray(sample_posterior(jax.random.key(0), moments), np.float64)[:, 0, 0]
    # Five standard errors of a mean and of a standard deviation of 100,000 samples.
    np.testing.assert_allclose((samples.mean(0) - mean) / std, 0, atol=5 / 100_000**0.5)
    np.testing.assert_allclose(samples.std(0) / std, 1, atol=5 / 200_000**0.5)


def test_scaled_as_the_autoencoder_says():
    moments = jnp.concatenate([jnp.ones((2, 1, 1, 3)), jnp.full((2, 1, 1, 3), -30.0)], axis=-1)
    np.testing.assert_allclose(latents_of(IDENTITY, jax.random.key(0), moments), (1 - 0.25) * 0.5, atol=1e-5)


def test_a_step_on_moments_is_a_step_on_their_latents():
    trainer = tiny.make_trainer()
    state, key = trainer.state(tiny.random_like(trainer.shapes.params)), jax.random.key(0)
    batch = tiny.random_batch()
    moments = np.concatenate([batch["image"], 0.3 * batch["image"]], axis=-1)
    step_key = stream(jax.random.fold_in(key, state.step), "posterior")
    step = make_train_step(trainer.model, trainer.diffusion, trainer.strategy, trainer.optimizer, trainer.config, IDENTITY)
    with jax.set_mesh(trainer.mesh):
        got = jax.jit(step)(state, {"moments": moments, "label": batch["label"]}, key)[1]
        latents = np.asarray(latents_of(IDENTITY, step_key, moments))
    expected = trainer.train_step()(state, {"image": latents, "label": batch["label"]}, key)[1]
    for name in ("loss", "mse", "vb", "grad_norm"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


def header(factor, shift, std):
    """Of latents that have a mean of 3 and these standard deviations before scaling."""
    config = {"scaling_factor": factor, "shift_factor": shift, "block_out_channels": [32]}
    return {"latents": {"vae": "there", "config": config}, "mean": [3.0] * len(std), "std": list(std)}


def test_scaled_statistics_are_those_of_what_is_trained_on():
    rng = np.random.default_rng(0)
    z = rng.normal(3, [2.0, 5.0], (100_000, 2))
    moments = np.concatenate([z, np.full_like(z, -30)], axis=-1)[:, None, None]
    trained_on = np.asarray(latents_of(IDENTITY, jax.random.key(0), jnp.asarray(moments)), np.float64)[:, 0, 0]
    mean, std = scaled_statistics({"latents": IDENTITY, "mean": z.mean(0), "std": z.std(0)})
    # float32 against float64, and noise of e^-15.
    np.testing.assert_allclose(trained_on.mean(0), mean, atol=1e-4)
    np.testing.assert_allclose(trained_on.std(0), std, rtol=1e-4)


@pytest.mark.parametrize("std, factor", [((5.0, 6.0), 0.18), ((1.0, 1.0), 0.31), ((1.0, 2.9), 1.0), ((1.0, 1.0), -1.0)])
def test_a_usual_scale_is_no_warning(std, factor):
    assert scale_warning(header(factor, 0.1, std)) is None


@pytest.mark.parametrize("std, factor", [((10_500.0, 9_000.0), 1.0), ((5.0, 6.0), 1.0), ((1.0, 0.2), 1.0), ((5.0, 6.0), 0.01)])
def test_an_unusual_scale_is_a_line_that_names_the_factor(std, factor):
    line = scale_warning(header(factor, 0.0, std))
    assert f"scaling_factor={factor:g}" in line and "there" in line and "\n" not in line
    assert f"{factor * min(std):.3g} to {factor * max(std):.3g}" in line
    assert scale_warning(header(1 / float(re.search(r"one over ([\d.e+]+),", line)[1]), 0.0, std)) is None or min(std) == 0.2


def test_another_scale_is_another_autoencoder(tmp_path):
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    autoencoder = Autoencoder(str(write_vae(tmp_path / "vae", "small")), mesh)
    autoencoder.check(autoencoder.identity)
    autoencoder.check(json.loads(json.dumps(autoencoder.identity)) | {"vae": "elsewhere"})
    config = CONFIGS["small"] | {"scaling_factor": 0.5}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    other = Autoencoder(str(tmp_path / "vae"), mesh)
    assert_one_line(lambda: other.check(autoencoder.identity), "scaling_factor=0.5", "scaling_factor=0.3611", "encode")


@pytest.mark.parametrize("decode", [False, True], ids=["encoder", "decoder"])
def test_it_is_lowered_without_weights_on_the_devices(tmp_path, decode):
    autoencoder = Autoencoder(str(write_vae(tmp_path, "four")), tiny.make_mesh((8, 1, 1)))
    image_shape = autoencoder.image_shape((4, 4, autoencoder.channels))
    compiled = autoencoder.lower(image_shape, 16, decode).compile()
    assert "_params" not in vars(autoencoder)
    (out,) = [s.shape for s in jax.tree.leaves(compiled.out_info)]
    assert out == ((16, *image_shape) if decode else (16, 4, 4, 2 * autoencoder.channels))
