"""What training says before its first step."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny

from speedit_jax.data.sources import open_source
from speedit_jax.reporting import console
from speedit_jax.training.step import ema_decay


def opening(**settings):
    config = tiny.make_config(**settings)
    return "\n".join(console.opening(tiny.make_trainer(**settings), open_source(config.data)))


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.05, 0.8, 0.97])  # warm at once, after 35 steps, and after the last
def test_the_share_left_is_what_an_average_holds(decay, warmup):
    """Against an average that starts at 1 and of which every later value is 0."""
    average = 1.0
    for step in range(50):
        average *= float(ema_decay(decay, warmup, np.int32(step)))
    assert console.share_left(decay, warmup, 50) == pytest.approx(average, rel=1e-5)  # its decays are float32


def test_the_share_left_of_a_run_without_end():
    """Its steps are not counted one by one: these would take 16 GB."""
    assert console.share_left(0.9999, True, 2**31 - 1) < 1e-100


def test_a_long_average_of_a_short_run_is_said():
    said = opening(training__num_steps=1500)
    assert (
        "after 1,500 steps the average holds 86% with decay 0.9999 of the initial weights; set training.ema_warmup=True" in said
    )
    said = opening(training__num_steps=1500, training__ema_decay=0.99, training__extra_ema_decays=(0.999, 0.5))
    assert "holds 22% with decay 0.999 of" in said
    for fine in ({"training__num_steps": 100_000}, {"training__num_steps": 1500, "training__ema_warmup": True}):
        assert "ema  " not in opening(**fine)


def test_what_decays_is_said_where_anything_does():
    assert "decay" not in opening(training__num_steps=100_000)
    params = tiny.make_trainer().shapes.params
    total = sum(leaf.size for leaf in _leaves(params))
    assert f"decay      0.1, all parameters: {total:,} parameters, 100.0%" in opening(
        optim__weight_decay=0.1, optim__decay_mask="all"
    )
    assert "decay      0.1, matrices only: " in opening(optim__weight_decay=0.1)


def test_its_last_commands_are_for_a_shell():
    lines = console.closing(Path("runs/my run"), tiny.make_trainer().model, None)
    report, sample = (shlex.split(line) for line in lines[-2:])
    assert report[-1] == "--workdir=runs/my run"
    assert sample[-4:] == ["--workdir=runs/my run", "--class_labels=0,1,2,3", "--num_images=64", "--out=runs/my run/new.png"]


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]
