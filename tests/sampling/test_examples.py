"""Examples with a part hidden, of stored latents, which the autoencoder decodes on all devices together."""

import types

import numpy as np
import tiny

from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.sampling.examples import masked_examples
from speedit_jax.testing.vae_weights import write_vae

LATENT = (4, 4, 4)


class Latents:
    """Three records."""

    def __init__(self):
        self._moments = np.random.default_rng(0).normal(size=(3, 2, *LATENT[:2], 2 * LATENT[2])).astype(np.float32)

    def __len__(self):
        return len(self._moments)

    def __getitem__(self, index):
        return {"moments": self._moments[index], "label": np.int32(index)}


def pictures(shape, vae):
    mesh = tiny.make_mesh(shape)
    autoencoder = Autoencoder(str(vae), mesh)
    model = types.SimpleNamespace(image_shape=LATENT)
    config = tiny.make_config(data__mask="boxes")
    parts = types.SimpleNamespace(
        config=config, mesh=mesh, model=model, autoencoder=autoencoder, encoded_by=autoencoder.identity, texts=None
    )
    return masked_examples(parts, Latents(), 64)[0]


def test_fewer_examples_than_devices(tmp_path):
    vae = write_vae(tmp_path / "vae", "four")
    of_eight, of_one = (pictures(shape, vae).pictures.astype(int) for shape in ((8, 1, 1), tiny.ONE))
    assert len(of_eight) == 3 and np.abs(of_eight - of_one).max() <= 1
