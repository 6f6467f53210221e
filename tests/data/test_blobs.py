"""The captioned blobs: what a caption says is in the picture, and no held-out pair is among the training's."""

import numpy as np
import pytest
from errors import assert_one_line
from folders import config

from speedit_jax.data import blobs
from speedit_jax.data.sources import open_source

PAIRS = {split: blobs.pairs(split) for split in blobs.SPLITS}


def test_held_out_pairs_have_known_parts():
    assert (len(PAIRS["train"]), len(PAIRS["held_out"])) == (45, 9)
    assert len({*PAIRS["train"], *PAIRS["held_out"]}) == 54
    assert sorted(place for _, place in PAIRS["held_out"]) == list(range(9))
    for held_out in PAIRS["held_out"]:
        for part in (0, 1):
            assert held_out[part] in {pair[part] for pair in PAIRS["train"]}


@pytest.mark.parametrize("split", blobs.SPLITS)
@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_pictures_show_what_their_captions_say(split, size):
    source = open_source(config("blobs", *size, split=split, synthetic_size=180))
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert np.abs(images).max() <= 1
    colours, places = blobs.recognise(images)
    for i, pair in enumerate(zip(colours, places, strict=True)):
        assert source.captions[i] == [blobs.caption(*pair)]
        assert source.class_names[source[i]["label"]] == source.captions[i][0]
        assert tuple(pair) in PAIRS[split]
    assert len({image.tobytes() for image in images}) == 180


def test_refusals():
    assert_one_line(lambda: open_source(config("blobs", split="test")), "train and held_out")
    assert_one_line(lambda: open_source(config("blobs", channels=1)), "data.channels=1")
