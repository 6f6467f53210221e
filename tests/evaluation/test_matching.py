"""evaluate --metrics=match: drawn images find pictures with their prompts as captions."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from commands import assert_fails, assert_works
from PIL import Image

from speedit_jax import storage
from speedit_jax.evaluation.matching import read_texts

COLOURS = {"a red square": (255, 0, 0), "a green square": (0, 255, 0), "the sea": (0, 0, 255)}


@pytest.fixture
def reference(tmp_path):
    root = tmp_path / "reference"
    root.mkdir()
    lines = []
    for number, (text, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (8, 8), colour).save(root / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": [text, "a colour"]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def drawn(tmp_path):
    """Red, dark red, blue of "a red square", "the sea" and "The  sea": two are right."""
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0, ..., 0], images[1, ..., 0], images[2, ..., 2] = 250, 120, 200
    np.savez(tmp_path / "new.npz", arr_0=images, arr_1=np.array([0, 1, 2]))
    (tmp_path / "new.json").write_text(json.dumps({"prompts": ["a red square", "the sea", "The  sea"]}))
    return tmp_path / "new.npz"


def flags(drawn, reference):
    return [f"--images={drawn}", f"--reference={reference}", "--features=pixels", "--metrics=match"]


def test_match(run, drawn, reference, tmp_path):
    result = run("evaluate", *flags(drawn, reference), f"--out={tmp_path / 'numbers.json'}")
    assert_works(result)
    found = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    assert found == pytest.approx({"match": 2 / 3, "match_error": 0.25, "match_chance": 1 / 3})


def test_images_in_a_captioned_folder(run, reference, tmp_path):
    result = run("evaluate", *flags(reference, reference), f"--out={tmp_path / 'numbers.json'}")
    assert_works(result)
    assert json.loads((tmp_path / "numbers.json").read_text())["metrics"]["match"] == 1


def test_mistakes(run, drawn, reference, tmp_path):
    record = drawn.with_suffix(".json")
    record.write_text(json.dumps({"prompts": ["a red square", "a dog", "the sea"]}))
    assert run("evaluate", *flags(drawn, reference)).err.endswith(
        "error: match: no image of the reference has the caption 'a dog'\n"
    )
    record.write_text(json.dumps({"class_labels": None}))
    assert_fails(run("evaluate", *flags(drawn, reference)), "needs the prompts of --images", "new.json")
    assert_fails(run("evaluate", *flags(drawn, drawn)), "needs a --reference with captions")
    (reference / "metadata.jsonl").unlink()
    assert_fails(run("evaluate", *flags(reference, reference)), "has a caption")


class InStore(type(Path())):
    """As a path in an object store: it opens what it names, and to anybody else its name is no file's."""

    def __fspath__(self) -> str:
        return f"gs:/{self}"

    def exists(self) -> bool:
        return os.path.exists(str(self))

    def open(self, mode: str = "r"):
        return open(str(self), mode)

    def read_text(self) -> str:
        return self.open().read()


def test_prompts_of_images_in_an_object_store(drawn, monkeypatch):
    monkeypatch.setattr(storage, "path", InStore)
    assert read_texts(["clip"], str(drawn), None, None, "auto").prompts == ["a red square", "the sea", "The  sea"]
