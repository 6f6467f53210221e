"""A run that starts from another's weights: other classes, another resolution, another network."""

import json

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works

from speedit_jax.training.checkpoint import Checkpoints

SYNTHETIC = ["--config.data.source=synthetic", "--config.data.channels=1"]
# A step that moves nothing: the weights that a run started from are those that it ends with.
STILL = ["--config.optim.learning_rate=0.0", "--config.optim.warmup_steps=0", "--config.training.ema_decay=0.0"]


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    return workdir


def saved(workdir, item):
    """{"path": array} of the newest checkpoint's params or ema."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.choose(None)
    tree = checkpoints._manager.restore(step)["state"][item]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def start(run, trained, workdir, *flags):
    result = run("train", *TINY, *STILL, f"--workdir={workdir}", f"--config.init_from={trained}", *flags)
    assert_works(result)
    return result.out


def test_the_same_classes_take_everything_over(run, trained, tmp_path):
    out = start(run, trained, tmp_path / "run")
    assert "init from  DiT-tiny/2 of 8 x 8, EMA of step 6" in out and "anew" not in out
    ema = saved(trained, "ema")
    for item in ("params", "ema"):
        for name, array in saved(tmp_path / "run", item).items():
            np.testing.assert_array_equal(array, ema[name])


def test_other_classes_and_another_size_keep_all_but_the_label_table(run, trained, tmp_path):
    shape = ["--config.data.height=12", "--config.data.width=16", "--config.data.synthetic_classes=3"]
    out = start(run, trained, tmp_path / "run", *SYNTHETIC, *shape)
    assert "classes 10 -> 3: the label table starts anew" in out
    before, after = saved(trained, "ema"), saved(tmp_path / "run", "ema")
    assert before.keys() == after.keys()
    label = [name for name in after if name.startswith("label/")]
    assert len(label) == 1 and after[label[0]].shape[0] == 4
    for name in after.keys() - set(label):
        np.testing.assert_array_equal(after[name], before[name])


def test_without_classes(run, trained, tmp_path):
    out = start(run, trained, tmp_path / "run", *SYNTHETIC, "--config.data.synthetic_classes=0")
    assert "classes 10 -> 0" in out
    assert not any(name.startswith("label/") for name in saved(tmp_path / "run", "ema"))


def test_it_goes_on_without_what_it_started_from(run, trained, tmp_path):
    source = tmp_path / "source"
    trained.rename(source)
    try:
        flags = [*TINY, f"--workdir={tmp_path / 'run'}", f"--config.init_from={source}", "--config.optim.schedule=constant"]
        assert_works(run("train", *flags))
    finally:
        source.rename(trained)
    result = run("train", *flags, "--config.training.num_steps=9")
    assert_works(result)
    assert "Going on from the checkpoint of step 6" in result.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.width=32"], ["holds another network", "has shape", "more"]),
        (["--config.model.name=DiG-tiny/2"], ["holds another network", "blocks/"]),
        (["--config.diffusion.prediction=v"], ["predicts epsilon, not v"]),
        (["--config.init_from=/no/such"], ["init_from=/no/such", "no checkpoints"]),
    ],
)
def test_another_network_is_refused_before_anything_is_written(run, trained, tmp_path, flags, words):
    workdir = tmp_path / "run"
    assert_fails(run("train", *TINY, f"--workdir={workdir}", f"--config.init_from={trained}", *flags), *words)
    assert not workdir.exists()


def test_the_run_records_what_it_started_from(run, trained, tmp_path):
    start(run, trained, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["init_from"] == str(trained)
