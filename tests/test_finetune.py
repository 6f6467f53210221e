"""A run that starts from another's weights: other classes, another resolution, another network."""

import json
import types

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works
from tiny import make_config

from speedit_jax.training.assembly import make_diffusion
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.finetune import _differences, label_rows

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
    assert "classes 10 -> 3: 0 rows of the label table are kept, by name, 3 start from random values, 10 are dropped\n" in out
    before, after = saved(trained, "ema"), saved(tmp_path / "run", "ema")
    assert before.keys() == after.keys()
    label = [name for name in after if name.startswith("label/")]
    assert len(label) == 1 and after[label[0]].shape[0] == 4
    np.testing.assert_array_equal(after[label[0]][3], before[label[0]][10], err_msg="the null label's row")
    for name in after.keys() - set(label):
        np.testing.assert_array_equal(after[name], before[name])


def test_rows_of_the_label_table_are_matched_by_name(run, trained, tmp_path):
    """The digits in another order, and only some of them."""
    out = start(run, trained, tmp_path / "run", "--config.data.classes=7,2,4")
    assert "classes 10 -> 3: 3 rows of the label table are kept, by name, 7 are dropped\n" in out
    before, after = (saved(workdir, "ema")["label/table"] for workdir in (trained, tmp_path / "run"))
    np.testing.assert_array_equal(after, before[[7, 2, 4, 10]])


def test_one_class_more_keeps_the_others(run, tmp_path):
    first = [*STILL, "--config.data.classes=1,2"]
    assert_works(run("train", *TINY, *first, f"--workdir={tmp_path / 'two'}"))
    out = start(run, tmp_path / "two", tmp_path / "run", "--config.data.classes=0,1,2", "--config.seed=1")
    assert "classes 2 -> 3: 2 rows of the label table are kept, by name, 1 start from random values\n" in out
    before, after = (saved(workdir, "ema")["label/table"] for workdir in (tmp_path / "two", tmp_path / "run"))
    np.testing.assert_array_equal(after[1:], before)
    assert after[0].any() and (after[0] != before[0]).any()


def test_without_a_null_label_before_its_row_starts_anew(run, tmp_path):
    assert_works(run("train", *TINY, *STILL, "--config.model.label_dropout=0.0", f"--workdir={tmp_path / 'first'}"))
    out = start(run, tmp_path / "first", tmp_path / "run")
    assert "10 rows of the label table are kept, by name, the null label's row starts from random values\n" in out
    before, after = (saved(workdir, "ema")["label/table"] for workdir in (tmp_path / "first", tmp_path / "run"))
    np.testing.assert_array_equal(after[:10], before)


def test_rows_of_imported_weights_without_names_are_matched_by_number():
    def rows(names, imported, wanted=("cat", "dog", "0")):
        meta = {"imported_from": "a.pt"} if imported else {}
        run = types.SimpleNamespace(class_names=names, meta=meta, model=types.SimpleNamespace(null_label=3))
        return [array.tolist() for array in label_rows(run, wanted, 3)]

    assert rows(["0", "1", "2"], imported=True) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert rows(["0", "1", "2"], imported=False) == [[0, 3], [2, 3]]
    assert rows(["bird", "cat", "0"], imported=True) == [[1, 2, 3], [0, 2, 3]]
    assert rows(["0", "1"], imported=True) == [[0, 3], [2, 3]], "another number of classes is another set"
    assert rows(["0", "1", "2"], imported=True, wanted=("0", "2", "1")) == [[0, 2, 1, 3], [0, 1, 2, 3]], "these are their numbers"


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
    assert "Resuming from the checkpoint of step 6" in result.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.width=32"], ["does not match this model", "has shape", "more"]),
        (["--config.model.name=DiG-tiny/2"], ["does not match this model", "blocks/"]),
        (
            ["--config.diffusion.prediction=v"],
            ["diffusion.prediction was 'epsilon', now 'v'", "--config.diffusion.prediction=ep"],
        ),
        (["--config.diffusion.schedule=cosine"], ["set --config.diffusion.schedule=linear", "--continue_with_changes"]),
        (["--config.diffusion.num_steps=500"], ["set --config.diffusion.num_steps=1000"]),
        (["--config.diffusion.path=linear"], ["diffusion.path was 'vp', now 'linear'"]),
        (["--config.model.rope=True"], ["model.rope was False, now True"]),
        (["--config.model.time_freq_shift=1"], ["set --config.model.time_freq_shift=0"]),
        (["--config.diffusion.variance=fixed_small"], ["does not match this model", "final/kernel"]),
        (["--config.init_from=/no/such"], ["init_from=/no/such", "no checkpoints", "the directory of another run"]),
    ],
)
def test_another_network_is_refused_before_anything_is_written(run, trained, tmp_path, flags, words):
    workdir = tmp_path / "run"
    assert_fails(run("train", *TINY, f"--workdir={workdir}", f"--config.init_from={trained}", *flags), *words)
    assert not workdir.exists()


def test_what_weights_of_a_flow_mean():
    """Whether they predict the image or the velocity, and how much noise they know; not what a flow does not look at."""

    def different(old, new):
        configs = [make_config(diffusion__path="linear", **of) for of in (old, new)]
        others = {"encoded_by": None, "text_encoder": None, "texts": None}
        sides = [types.SimpleNamespace(config=of, diffusion=make_diffusion(of), **others) for of in configs]
        return _differences(*sides)

    assert different({}, {"diffusion__prediction": "x0"}) == {"diffusion.prediction": ["epsilon", "x0"]}
    assert different({}, {"diffusion__noise_scale": 2.0}) == {"diffusion.noise_scale": [1.0, 2.0]}
    assert different({}, {"diffusion__prediction": "v", "diffusion__x0_clamp": 0.1}) == {}


def test_what_was_trained_otherwise_is_taken_on_the_word(run, trained, tmp_path):
    flags = ["--config.diffusion.schedule=cosine", "--config.model.time_freq_shift=1", "--continue_with_changes"]
    out = start(run, trained, tmp_path / "run", *flags)
    said = "trained with other settings: model.time_freq_shift was 0, now 1; diffusion.schedule was 'linear', now 'cosine'"
    assert f"init from  {said}\n" in out


def test_two_names_of_one_schedule(run, trained, tmp_path):
    other = ["--config.diffusion.schedule=cosine"]
    assert_works(run("train", *TINY, *STILL, *other, f"--workdir={tmp_path / 'first'}"))
    assert "trained with other settings" not in start(
        run, tmp_path / "first", tmp_path / "run", "--config.diffusion.schedule=squaredcos_cap_v2"
    )


def test_the_run_records_what_it_started_from(run, trained, tmp_path):
    start(run, trained, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["init_from"] == str(trained)
