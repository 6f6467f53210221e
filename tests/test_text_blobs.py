"""A network with text learns words: it draws pairs of a colour and a place that it never saw together."""

import pytest

from benchmarks import text_blobs


@pytest.mark.slow
def test_held_out_pairs_are_drawn(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # the tests' eight devices and unoptimised code are too slow for a thousand steps
    found = text_blobs.measure(tmp_path, "speedit", "DiT-tiny/4", steps=1000, seed=0)
    # Chance is 2 %. docs/text.md has the shares of three seeds, and those of the strategy "uniform".
    assert found["both"] >= 0.8, found
