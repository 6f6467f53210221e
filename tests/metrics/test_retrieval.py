"""The match of captions: brute force, and sets whose match is known; CLIP score of known cosines."""

import numpy as np
import pytest

from speedit_jax.metrics import precision_recall
from speedit_jax.metrics.retrieval import caption_match, clip_score

REFERENCE = np.eye(4)
CAPTIONS = [["a cat", "a pet"], ["a dog", "a pet"], ["a  House"], ["a tree"]]


def test_nearest_captions_count():
    images = np.array([[0.9, 0.1, 0, 0], [0, 0.8, 0.1, 0], [0, 0.9, 0, 0], [0, 0, 1, 0.5], [0, 0, 1, 0.9]])
    prompts = ["a cat", "A Pet", "a cat", "a house", "a tree"]
    share, error, chance = caption_match(images, prompts, REFERENCE, CAPTIONS)
    # Of prompts: a cat 1 of 2, a pet 1 of 1, a house 1 of 1, a tree 0 of 1.
    assert share == pytest.approx(3 / 5)
    assert error == pytest.approx(np.std([0.5, 1, 1, 0], ddof=1) / 2)
    assert chance == pytest.approx((1 + 2 + 1 + 1 + 1) / 5 / 4)


def test_chance_is_what_unrelated_images_reach():
    rng = np.random.default_rng(0)
    reference, images = rng.normal(size=(40, 3)), rng.normal(size=(4000, 3))
    captions = [[f"number {i % 10}", f"half {i % 2}"] for i in range(40)]
    prompts = [captions[i][j] for i, j in zip(rng.integers(0, 40, 4000), rng.integers(0, 2, 4000), strict=True)]
    share, _, chance = caption_match(images, prompts, reference, captions)
    assert chance == pytest.approx(0.3, abs=0.02)
    assert share == pytest.approx(chance, abs=0.04)  # five standard deviations of 4,000 coins


@pytest.mark.parametrize("block", [1, 7])
def test_whatever_the_block(monkeypatch, block):
    rng = np.random.default_rng(1)
    reference, images = rng.normal(size=(30, 5)), rng.normal(size=(20, 5))
    captions = [[f"number {i % 6}"] for i in range(30)]
    prompts = [captions[i][0] for i in ((images[:, None] - reference) ** 2).sum(axis=2).argmin(axis=1)]
    monkeypatch.setattr(precision_recall, "_BLOCK", block)
    assert caption_match(images, prompts, reference, captions)[0] == 1


def test_a_prompt_that_is_no_caption():
    with pytest.raises(ValueError, match=r"^a bird$"):
        caption_match(REFERENCE, ["a cat", "a bird", "a dog", "a cat"], REFERENCE, CAPTIONS)


def test_clip_score_of_known_cosines():
    angles = np.radians([60, 0, 90, 180])
    images = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    texts = np.array([[1.0, 0.0]] * 4)
    score, error = clip_score(images, texts, ["a cat", "a dog", "A  cat", "a bird"])
    # 50, 100, 0 and, as no pair is below zero, 0; of prompts: 25, 100, 0.
    assert score == pytest.approx(150 / 4)
    assert error == pytest.approx(np.std([25, 100, 0], ddof=1) / 3**0.5)
    assert clip_score(images[:1], texts[:1], ["a cat"])[1] == 0
