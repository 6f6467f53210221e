"""Parts of a network that no published format can store."""

import types
from pathlib import Path

import pytest

from speedit_jax.config import get_config
from speedit_jax.conversion.exporting import unpublished

PARTS = {"qk_norm": True, "rope": True, "patch_bottleneck": 4, "mlp": "swiglu", "norm": "rms"}


def make_run(name, **parts):
    config = get_config(name)
    config.model.update(parts)
    return types.SimpleNamespace(workdir=Path("runs/a"), config=config, model=types.SimpleNamespace(text=None, hinted=False))


@pytest.mark.parametrize("part", PARTS)
def test_each_is_told_by_its_name(part):
    assert unpublished(make_run("DiT-S/2")) == ""
    told = unpublished(make_run("DiT-S/2", **{part: PARTS[part]}))
    assert told.startswith(f"runs/a was trained with model.{part}") and "no published format" in told


def test_digs_own_rms_norm_is_published():
    assert unpublished(make_run("DiG-S/2", norm="rms")) == ""


def test_sprint_is_refused_in_a_line():
    run = make_run("DiT-S/2")
    run.config.tokens.method = "sprint"
    assert "tokens.method=sprint" in unpublished(run) and "\n" not in unpublished(run)
    run.config.tokens.method = "route"
    assert unpublished(run) == ""
