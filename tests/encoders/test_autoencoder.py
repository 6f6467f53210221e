"""What the diffusion model trains on: samples of the posterior, scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_weights import write_vae

import tiny
from speedit_jax.encoders.autoencoder import Autoencoder, latents_of, sample_posterior
from speedit_jax.training.step import make_train_step, stream

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


@pytest.mark.parametrize("decode", [False, True], ids=["encoder", "decoder"])
def test_it_is_lowered_without_weights_on_the_devices(tmp_path, decode):
    autoencoder = Autoencoder(str(write_vae(tmp_path, "four")), tiny.make_mesh((8, 1, 1)))
    image_shape = autoencoder.image_shape((4, 4, autoencoder.channels))
    compiled = autoencoder.lower(image_shape, 16, decode).compile()
    assert "_params" not in vars(autoencoder)
    (out,) = [s.shape for s in jax.tree.leaves(compiled.out_info)]
    assert out == ((16, *image_shape) if decode else (16, 4, 4, 2 * autoencoder.channels))
