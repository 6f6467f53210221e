"""Text to emoji: the folder of the npm package (a small one of its layout), and the measurement at its extremes."""

import io
import json

import numpy as np
import pytest
from emoji_package import picture, write_package
from errors import assert_one_line
from PIL import Image

from benchmarks import emoji_page, emoji_text
from speedit_jax.config import get_config
from speedit_jax.data.captions import read_captions
from speedit_jax.data.sources import open_source


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package") / "package.tgz")


@pytest.fixture(scope="module")
def data(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "data"
    emoji_text.prepare(archive, out)
    return out


def open_folder(root):
    config = get_config().data
    config.update(source=f"folder:{root}", height=32, width=32)
    return open_source(config)


def test_captions_and_what_is_held_out(data):
    train, apart = (open_folder(data / part) for part in ("train", "held_out"))
    captions = {name: text for source in (train, apart) for name, text in zip(source.files, read_captions(source), strict=True)}
    assert captions["1f44b.png"] == ["hand 1f44b", "some hand"]
    assert captions["1f44b-1f3fc.png"] == ["hand 1f44b, medium-light skin tone", "some hand, medium-light skin tone"]
    assert captions["1f44b-1f3fb-1f3fd.png"][0] == "hand 1f44b, light and medium skin tone"
    assert captions["flag.png"] == ["flag"] and len(captions) == 4 * 7 + 1
    # Of three bases with five tones that differ, the first and the third have one held out: the first tone and the second.
    assert apart.files == ("1f44b-1f3fb.png", "1f91a-1f3fc.png")
    assert (data / "held_out" / "prompts.txt").read_text().splitlines() == [captions[name][0] for name in apart.files]


def drawn(data, path, pictures):
    """Samples as `sample` writes them, four of each prompt, of the given pictures."""
    prompts = (data / "held_out" / "prompts.txt").read_text().splitlines()
    numbers = np.arange(8) % 2
    images = [np.asarray(Image.open(io.BytesIO(pictures[number])).convert("RGB").resize((32, 32))) for number in numbers]
    np.savez(path, arr_0=np.stack(images), arr_1=numbers)
    path.with_suffix(".json").write_text(json.dumps({"prompts": prompts}))
    return path


def test_true_pictures_are_right(data, tmp_path):
    true = [picture("1F44B", 1), picture("1F91A", 2)]
    found = emoji_text.measure(drawn(data, tmp_path / "new.npz", true), data)
    assert (found["samples"], found["captions"], found["base_of_true_pictures"]) == (8, 2, 1.0)
    assert [found[name]["share"] for name in ("tone", "tone_clear", "base")] == [1, 1, 1]


def test_another_tone_and_another_base_are_wrong(data, tmp_path):
    found = emoji_text.measure(drawn(data, tmp_path / "tone.npz", [picture("1F44B", 4), picture("1F91A", 2)]), data)
    assert [found[name]["share"] for name in ("tone", "base")] == [0.5, 1]
    assert found["tone"]["error"] == pytest.approx(0.5)  # of two captions, 0 and 1
    found = emoji_text.measure(drawn(data, tmp_path / "base.npz", [picture("1F590", 1), picture("1F44B", 2)]), data)
    assert [found[name]["share"] for name in ("tone", "base")] == [1, 0]


def test_mistakes(archive, data, tmp_path):
    assert_one_line(lambda: emoji_text.prepare(archive, data), "is there already")
    (tmp_path / "no.tgz").write_bytes(b"x")
    assert_one_line(lambda: emoji_text.prepare(tmp_path / "no.tgz", tmp_path / "out"), "is not the package", "npm pack")
    assert not (tmp_path / "out").exists()
    path = drawn(data, tmp_path / "new.npz", [picture("1F44B", 1)] * 2)
    path.with_suffix(".json").write_text(json.dumps({"prompts": ["a cat", "a dog"]}))
    assert_one_line(lambda: emoji_text.measure(path, data), "'a cat' is not a held-out caption")


def test_the_page_has_the_numbers_and_the_pictures(data, tmp_path):
    true = [picture("1F44B", 1), picture("1F91A", 2)]
    found = emoji_text.measure(drawn(data, tmp_path / "pictures.npz", true), data)
    run = {"model": "DiT-S/4", "strategy": "speedit", "steps": 1234, "batch_size": 10, "pictures": 27, "pixels": 32}
    record = {"run": run, "guidance": {"2": found}, "picture_guidance": 2.0, "pictures": ["hand 1f44b, light skin tone"]}
    text = emoji_page.page(record, "emoji")
    assert "**1,234 steps** of batch 10" in text and "| guidance 2 | 100.0 ± 0.0 % | " in text
    assert "1. hand 1f44b, light skin tone\n" in text and "![Drawings](emoji.png)" in text
    prompts = (data / "held_out" / "prompts.txt").read_text().splitlines()
    emoji_page.draw_rows(data, tmp_path, prompts, tmp_path / "rows.png")
    rows = np.asarray(Image.open(tmp_path / "rows.png"))
    assert rows.shape == (2 * 34 * 3, 9 * 34 * 3, 3)
    # Of each row the first cell is the true picture, the next four are drawn: here all the same. The rest stays white.
    for y, content in enumerate(true):
        cells = rows.reshape(2, 102, 9, 102, 3)[y, 50, :, 50]
        colour = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[0, 0]
        assert (cells[:5] == colour).all() and (cells[5:] == 255).all()
