"""timesteps as a user meets it: no data, a picture and its numbers."""

import json

import numpy as np
import pytest
from commands import assert_fails, assert_works
from PIL import Image

from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.diffusion.timesteps import PRESETS, make_strategy

# A source that is not there: nothing of it is opened.
CONFIG = ["--config=configs/base.py", "--config.data.source=folder:/no/such"]


@pytest.mark.parametrize("strategy", PRESETS)
def test_every_strategy_is_drawn(run, tmp_path, strategy):
    result = run("timesteps", *CONFIG, f"--config.timesteps.strategy={strategy}", f"--out={tmp_path / 'x.png'}")
    assert_works(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 10
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["description"] in result.out and record["description"].startswith(f"{strategy}: T=1000")
    assert [len(record[name]) for name in ("t", "log_snr", "weight")] == [1000] * 3
    schedule = make_schedule("linear", 1000)
    expected = make_strategy(schedule, strategy)
    np.testing.assert_allclose(np.exp(record["log_snr"]), schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), rtol=1e-12)
    assert [entry["step"] for entry in record["shown"]] == ([0, 25_000, 50_000] if strategy == "clts" else [0])
    for entry in record["shown"]:
        density, weight = np.array(entry["density"]), np.array(record["weight"])
        np.testing.assert_allclose(density, expected.marginal(256, entry["step"]), rtol=1e-12)
        np.testing.assert_allclose(entry["product"], density * weight, rtol=1e-12)
        np.testing.assert_allclose(entry["quarters"], density.reshape(4, 250).sum(1), rtol=1e-9)
        np.testing.assert_allclose([entry["mean_t"], entry["mean_weight"]], [density @ np.arange(1000), density @ weight])


def test_the_whole_config_counts(run, tmp_path):
    flags = ["--config.diffusion.prediction=v", "--config.diffusion.schedule=quad", "--config.training.batch_size=7"]
    assert_works(run("timesteps", *CONFIG, *flags, f"--out={tmp_path / 'new' / 'x'}"))
    record = json.loads((tmp_path / "new" / "x.json").read_text())
    assert (record["schedule"], record["prediction"], record["batch_size"]) == ("quad", "v", 7)
    strategy = make_strategy(make_schedule("quad", 1000), "speedit", prediction="v")
    np.testing.assert_allclose(record["weight"], strategy.weights, rtol=1e-12)
    np.testing.assert_allclose(record["shown"][0]["density"], strategy.marginal(7), rtol=1e-12)


def test_mistakes_are_one_line(run, tmp_path):
    out = f"--out={tmp_path / 'x'}"
    assert_fails(run("timesteps", out), "--config is missing")
    assert_fails(run("timesteps", *CONFIG, out, "--config.timesteps.strategy=foo"), "timesteps.strategy", "foo")
    for flag, words in (("timesteps.gamma=nan", "timesteps.gamma=nan"), ("training.batch_size=0", "at least 1")):
        assert_fails(run("timesteps", *CONFIG, out, "--config.timesteps.strategy=min_snr", f"--config.{flag}"), words)
    assert_fails(run("timesteps", *CONFIG, "--out=/dev/null/x"), "/dev/null/x", "--out")
    for nameless in ("", ".", "/"):
        assert_fails(run("timesteps", *CONFIG, f"--out={nameless}"), f"--out={nameless}: give a file")
    assert not any(tmp_path.iterdir())
