"""A CLIP from pixels and words to vectors, as transformers' processor and model make them."""

import sys

import jax
import numpy as np
import pytest
from errors import assert_one_line
from PIL import Image
from recorded import write_clip

from speedit_jax import sharding
from speedit_jax.encoders.clip import ClipEncoder

TEXTS = ["a red blob", "", "Blob, red. a red", "a red blob", "a blob, a blob, a red blob, a blob. a blob"]
SHAPES = [(12, 12, 3), (12, 12, 1), (40, 31, 3), (7, 19, 3), (25, 12, 1), (13, 14, 3)]


def mesh():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our encoder, transformers' model, its processor)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    directory = write_clip(tmp_path_factory.mktemp("clip"))
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.CLIPModel.from_pretrained(directory).eval().requires_grad_(False)
    return ClipEncoder(str(directory), mesh()), model, transformers.CLIPProcessor(processor.from_pretrained(directory), tokenizer)


def unit(vectors):
    vectors = getattr(vectors, "pooler_output", vectors).numpy()  # transformers 5 puts them into an object
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_images(both, shape):
    ours, model, processor = both
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    pictures = [Image.fromarray(image.squeeze()) for image in pixels]
    inputs = processor(images=pictures, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(np.stack([ours.prepare(image) for image in pixels]), inputs.permute(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(ours(pixels)["clip"], unit(model.get_image_features(pixel_values=inputs)), atol=1e-5)


def test_texts(both):
    ours, model, processor = both
    inputs = processor(text=TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=16)
    np.testing.assert_allclose(ours.of_texts(TEXTS), unit(model.get_text_features(**inputs)), atol=1e-5)
    assert ours.too_long(TEXTS) == TEXTS[-1:]


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_line(lambda: ClipEncoder(str(write_clip(tmp_path)), mesh()), "pip install", "[text]")


def test_directories_that_do_not_serve(tmp_path):
    assert_one_line(lambda: ClipEncoder(str(tmp_path), mesh()), f"{tmp_path} holds no config.json", "as transformers stores it")
    pytest.importorskip("transformers")
    other = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    assert_one_line(
        lambda: ClipEncoder(str(write_clip(tmp_path / "size", other)), mesh()), "crops to 24 pixels, but the network sees 12"
    )
    directory = write_clip(tmp_path / "words")
    (directory / "vocab.json").unlink()
    (directory / "merges.txt").unlink()
    assert_one_line(lambda: ClipEncoder(str(directory), mesh()), "tokenizer", str(directory))
