"""Names on the Hugging Face hub, and the line where its library is missing; tests/conversion/test_hub.py talks to a hub."""

import sys

import pytest
from errors import assert_one_line

from speedit_jax.interop import model_hub
from speedit_jax.interop.model_hub import Place


@pytest.mark.parametrize(
    "where, place",
    [
        ("hf:facebook/DiT-XL-2-256", Place("facebook/DiT-XL-2-256")),
        ("hf:owner/name@v1.0", Place("owner/name", "v1.0")),
        ("hf:owner/name/sub/a.pt", Place("owner/name", None, "sub/a.pt")),
        ("hf:owner/name@refs/pr/3/vae", Place("owner/name", "refs/pr/3", "vae")),
    ],
)
def test_places(where, place):
    assert model_hub.parse(where) == place and str(place) == where


@pytest.mark.parametrize("where", ["hf:", "hf:name", "hf:/name", "hf:owner/", "hf:owner/name@", "hf://owner/name", "hf:o/n@v@w"])
def test_what_is_no_place_is_one_line(where):
    assert_one_line(lambda: model_hub.parse(where), "hf:OWNER/NAME")


def test_without_the_library_each_use_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: model_hub.download(Place("owner/name"), None), lambda: model_hub.check_access("owner/name")):
        assert_one_line(use, "needs huggingface_hub", "pip install -e '.[hub]'")
