"""Weights out, and in again, by the command itself."""

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works, checksums
from safetensors.numpy import load_file
from test_pytorch_parity import section

from speedit_jax.training.checkpoint import Checkpoints

from .networks import assert_same_tensors, restored


@pytest.mark.parametrize("name", ["dit", "dig"])
def test_a_round_trip_is_exact(run, imported, tmp_path, name):
    arrays, _, workdir = imported(name)
    out = tmp_path / "new" / "out.safetensors"
    result = run("convert", f"--workdir={workdir}", f"--to={out}")
    assert_works(result)
    assert "note" not in result.out
    state, back = section(arrays, "state/"), load_file(out)
    assert_same_tensors(back, state)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    before = checksums(out.parent)
    assert_fails(run("convert", f"--workdir={workdir}", f"--to={out}"), "--to", "exists")
    assert checksums(out.parent) == before


def test_a_trained_run_goes_out_and_in(run, tmp_path):
    flags = ["--config.training.num_steps=3", f"--workdir={tmp_path / 'trained'}"]
    assert_works(run("train", *TINY, *flags))
    trained = {weights: restored(tmp_path / "trained", weights)[1] for weights in ("ema", "raw")}
    for weights, params in trained.items():
        out, workdir = tmp_path / f"{weights}.safetensors", tmp_path / weights
        assert_works(run("convert", f"--workdir={tmp_path / 'trained'}", f"--to={out}", f"--weights={weights}"))
        assert_works(run("convert", f"--from={out}", f"--workdir={workdir}", "--config.model.heads=2"))
        _, back, meta = restored(workdir)
        jax.tree.map(np.testing.assert_array_equal, back, params)
        # Pixels, not latents.
        assert meta["image_shape"] == [8, 8, 1] and meta["config"]["sampling"]["clip"] is True
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, trained.values()), strict=True))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_what_is_not_finite_stays(run, imported, tmp_path, weights):
    _, _, workdir = imported("dit")
    _, params, meta = restored(workdir)
    broken = jax.tree.map(np.array, params)
    broken["final"]["bias"][0] = np.nan
    checkpoints = Checkpoints(tmp_path / "run", create=True)
    checkpoints.save_weights(0, *((broken, params) if weights == "raw" else (params, broken)), meta)
    checkpoints.wait()
    export = ["convert", f"--workdir={tmp_path / 'run'}", f"--weights={weights}"]
    for out in ("x.safetensors", "x/"):
        flags = [f"--to={tmp_path / out}"]
        assert_fails(run(*export, *flags), f"the {weights} weights of step 0", "final_layer.linear.bias is not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    other = {"ema": "raw", "raw": "ema"}[weights]
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--weights={other}", f"--to={tmp_path / 'x.safetensors'}"))
