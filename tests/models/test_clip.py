"""CLIP's towers against transformers' at random weights (fixture, float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import recorded, weights, write_clip

from speedit_jax.interop.clip import tensor_name
from speedit_jax.models.clip import load_clip

RECORDED = recorded("clip")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize("tower", ["text", "image"])
def test_float32_is_transformers(clip, tower):
    network, params = clip
    inputs = RECORDED["numbers" if tower == "text" else "images"].astype(np.int32 if tower == "text" else np.float32)
    found = getattr(network, tower)(params[tower], inputs)
    np.testing.assert_allclose(found, RECORDED[f"of_{tower}s"], atol=1e-5)


def test_float64_is_transformers(clip):
    network, params = clip
    left = weights("clip")

    def exact(path, like):
        value = left.pop(tensor_name(tuple(key.key for key in path)))
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(like.ndim) if path[-1].key == "kernel" else None
        return jnp.asarray(value.transpose(axes) if axes else value)

    with jax.enable_x64(True):
        params = jax.tree_util.tree_map_with_path(exact, params)
        of_texts = network.text(params["text"], RECORDED["numbers"])
        of_images = network.image(params["image"], RECORDED["images"])
    assert of_texts.dtype == of_images.dtype == np.float64 and not left
    np.testing.assert_allclose(of_texts, RECORDED["of_texts"], atol=1e-12)
    np.testing.assert_allclose(of_images, RECORDED["of_images"], atol=1e-12)


def test_what_follows_the_end_changes_nothing(clip):
    network, params = clip
    numbers = np.array([[63, 5, 64, 64, 64], [63, 64, 1, 2, 3]])
    longer = np.pad(numbers, ((0, 0), (0, 4)))
    np.testing.assert_allclose(network.text(params["text"], longer), network.text(params["text"], numbers), atol=1e-6)


def test_an_old_end_of_text(clip, tmp_path):
    """Configs before 2023 say 2, and the highest number is meant."""
    network, params = clip
    text = RECORDED["text"]["config"]["text_config"] | {"eos_token_id": 2}
    old, _ = load_clip(write_clip(tmp_path, text_config=text))
    numbers = RECORDED["numbers"]
    np.testing.assert_array_equal(old.text(params["text"], numbers), network.text(params["text"], numbers))
