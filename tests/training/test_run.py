"""A run's directory continues only the run it holds."""

import contextlib

import jax
import numpy as np
import pytest
import tiny
from errors import assert_one_line
from jax.experimental import multihost_utils

from speedit_jax.config import complete, get_config
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError
from speedit_jax.training import run
from speedit_jax.training.checkpoint import Checkpoints


def describe(latents=None, **changes):
    config = tiny.make_config(**changes)
    source = open_source(config.data)
    return run.describe(config, source, source.image_shape, latents)


@pytest.fixture
def workdir(tmp_path):
    """The directory of a run."""
    run.claim(tmp_path / "a" / "b", describe())
    return tmp_path / "a" / "b"


def check_hosts(monkeypatch, *metas):
    """As the last of several processes, of which each has one of these."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: len(metas))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: told.append(mine) or np.stack(told))
    for meta in metas:
        run.check_hosts(meta)


def test_hosts_train_on_the_same_data_in_the_same_way(monkeypatch):
    elsewhere = describe(data__threads=7)
    elsewhere["config"]["data"]["source"] = "folder:/a/copy"
    check_hosts(monkeypatch, describe(), elsewhere)
    settings = ({"seed": 1}, {"mesh__fsdp": 2}, {"training__num_steps": 7}, {"checkpoint__every": 7})
    for changes, what in (({"data__synthetic_size": 96}, "data"), *((changes, "settings") for changes in settings)):
        metas = describe(), describe(), describe(**changes)
        assert_one_line(lambda metas=metas: check_hosts(monkeypatch, *metas), f"process 2 of 3 has other {what} than process 0")


def test_nothing_is_written_before_all_hosts_have_looked(tmp_path, monkeypatch):
    """A run.json that appears while another process looks would be one that is damaged to it."""
    waited = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda _: waited.append((tmp_path / "run.json").exists()))
    run.claim(tmp_path, describe())
    assert waited == [False] and (tmp_path / "run.json").exists()
    run.claim(tmp_path, describe())
    assert waited == [False, True]


def test_claim_writes_what_the_run_is(workdir):
    meta = run.read_run(workdir / "run.json")
    assert meta == describe()
    assert meta["config"]["optim"]["learning_rate"] == 1e-4
    assert meta["image_shape"] == [8, 8, 1]
    assert meta["class_names"] == [f"class {i}" for i in range(10)]
    assert set(meta["versions"]) >= {"speedit_jax", "jax"}
    assert [p.name for p in workdir.iterdir()] == ["run.json"]


def test_claiming_again_changes_nothing(workdir):
    before = (workdir / "run.json").read_bytes()
    run.claim(workdir, describe() | {"versions": {"jax": "another"}})
    assert (workdir / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__learning_rate": 1.0}, "optim.learning_rate was 0.0001, now 1.0"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"model__depth": 3}, "model.depth was 2, now 3"),
        ({"training__batch_size": 32}, "training.batch_size was 16, now 32"),
        ({"timesteps__sampling": "uniform"}, "timesteps.sampling was None, now 'uniform'"),
        ({"data__flip": True}, "data.flip was False, now True"),
        # The data's shape changes the data too; both are said.
        ({"data__height": 16}, r"image_shape was \[8, 8, 1\], now \[16, 8, 1\]; data.height was 8, now 16; the data has changed"),
        (
            {"seed": 1, "model__depth": 3, "training__ema_decay": 0.5, "optim__b1": 0.5},
            r"model.depth .*; optim.b1 .*; seed was 0, now 1 and 1 more",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(workdir, changes, message):
    before = (workdir / "run.json").read_bytes()
    with pytest.raises(UserError, match=rf"{workdir} was made with other settings \(.*{message}.*\); use its settings") as error:
        run.claim(workdir, describe(**changes))
    assert "\n" not in str(error.value)
    assert (workdir / "run.json").read_bytes() == before
    assert [p.name for p in workdir.iterdir()] == ["run.json"]


def test_another_autoencoder_is_refused(tmp_path):
    run.claim(tmp_path, describe(latents={"vae": "here", "weights": "a"}))
    run.claim(tmp_path, describe(latents={"vae": "there", "weights": "a"}))
    for latents in ({"vae": "here", "weights": "b"}, None):
        with pytest.raises(UserError, match="the autoencoder has changed"):
            run.claim(tmp_path, describe(latents=latents))


def test_other_data_are_refused(workdir):
    with pytest.raises(UserError, match="the data has changed"):
        run.claim(workdir, describe() | {"data_fingerprint": "0" * 16})


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint__every": 7, "checkpoint__keep_last": 5, "checkpoint__keep_every": 100},
        {"mesh__data": 1, "mesh__fsdp": -1, "mesh__tensor": 2},
        {"sampling__num_steps": 9, "sampling__guidance_scale": 4.0},
        {"data__threads": 1, "training__log_every": 3, "training__sample_every": 50},
        {"training__num_steps": 1000},
        {"training__accumulation": 2, "model__remat": "lean", "data__max_broken": 3},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_what_does_not_change_the_result_may_change(workdir, changes):
    run.claim(workdir, describe(**changes))


def test_what_comes_too_late_is_said(tmp_path):
    run.claim(tmp_path, describe(init_from="runs/a"))
    _, lines = run.claim(tmp_path, describe(init_from="runs/b"), step=7)
    assert lines == ["without effect after the first step: init_from was 'runs/a', now 'runs/b'"]
    assert run.claim(tmp_path, describe(), step=7)[1] == [], "what it started from may be gone"


@pytest.mark.parametrize(
    ("name", "key", "kernel"),
    [
        ("DiT-tiny/2", "attention", "cudnn"),
        ("DiT-tiny/2", "attention", "pallas"),
        ("DiG-tiny/2", "gla", "pallas_tpu"),
        ("DiG-tiny/2", "gla", "pallas_gpu"),
        ("DiT-tiny/2", "attention", "chunked"),
    ],
)
def test_a_run_with_an_accelerators_kernels_opens_here(tmp_path, name, key, kernel):
    meta = describe(**{"model.name": name, f"model.{key}": kernel})
    with contextlib.closing(Checkpoints(tmp_path, create=True)) as checkpoints:
        checkpoints.save_weights(4, {"a": np.zeros(2)}, {"a": np.zeros(2)}, meta)
        checkpoints.wait()
    opened = run.open_run(tmp_path)
    assert opened.model.mixer == ("chunked" if kernel == "chunked" else "xla")
    assert opened.meta["config"]["model"][key] == kernel


def test_imported_weights_are_no_run(tmp_path):
    run.claim(tmp_path, describe() | {"imported_from": "a.pt"})
    with pytest.raises(
        UserError, match=rf"{tmp_path} holds weights imported from a.pt, not a training run; choose another --workdir"
    ):
        run.claim(tmp_path, describe())


def test_a_cosine_may_not_be_prolonged(tmp_path):
    run.claim(tmp_path, describe(optim__schedule="cosine"))
    with pytest.raises(UserError, match=r"training.num_steps was 100, now 200"):
        run.claim(tmp_path, describe(optim__schedule="cosine", training__num_steps=200))


def test_a_key_that_is_new_or_gone_is_named(workdir):
    meta = describe()
    meta["config"]["optim"]["b3"] = 0.5
    with pytest.raises(UserError, match=r"optim.b3 was None, now 0.5"):
        run.claim(workdir, meta)


def test_a_key_younger_than_the_run_has_its_default(tmp_path):
    meta = describe()
    del meta["config"]["model"]["qk_norm"], meta["config"]["checkpoint"]
    run.claim(tmp_path, meta)
    run.claim(tmp_path, describe())
    assert complete(meta["config"]).to_dict() == describe()["config"]
    assert complete({}).to_dict() == get_config().to_dict() | {"optim": get_config().optim.to_dict() | {"decay_mask": "all"}}
    with pytest.raises(UserError, match="qk_norm was False, now True"):
        run.claim(tmp_path, describe(model__qk_norm=True))


def test_a_key_that_did_nothing_then():
    """Older flows predicted the velocity and older DiTs had layer norms, whatever their configs say."""
    saved = {"model": {"name": "DiT-S/2", "norm": "rms"}, "diffusion": {"path": "linear", "prediction": "x0"}}
    older, younger = complete(saved), complete({**saved, "diffusion": {**saved["diffusion"], "x0_clamp": 0.05}})
    assert (older.diffusion.prediction, older.model.norm) == ("epsilon", "layer")
    assert (younger.diffusion.prediction, younger.model.norm) == ("x0", "rms")
    kept = complete({"model": {"name": "DiG-S/2", "norm": "rms"}, "diffusion": {"path": "vp", "prediction": "x0"}})
    assert (kept.diffusion.prediction, kept.model.norm) == ("x0", "rms")


def test_the_two_ways_on_are_named(workdir):
    with pytest.raises(
        UserError, match="or --continue_with_changes to resume from step 7 with these, or start a new run"
    ) as error:
        run.claim(workdir, describe(optim__learning_rate=1.0), step=7)
    assert f"--config.init_from={workdir}" in str(error.value)
    for with_changes in (False, True):
        with pytest.raises(UserError, match="another network starts in another --workdir"):
            run.claim(workdir, describe(model__depth=3), with_changes=with_changes)
        with pytest.raises(UserError, match=f"does not fit these; start a new run .*--config.init_from={workdir}") as error:
            run.claim(workdir, describe(data__synthetic_classes=3), with_changes=with_changes)
        assert "--continue_with_changes" not in str(error.value)


def test_changes_are_recorded_and_later_starts_are_compared_with_them(workdir):
    before = (workdir / "run.json").read_bytes()
    first = describe(optim__learning_rate=0.5)
    meta, lines = run.claim(workdir, first, step=7, with_changes=True)
    assert lines == ["changed from step 7 on: optim.learning_rate was 0.0001, now 0.5"]
    assert meta == first | {"changes": [{"step": 7, "optim.learning_rate": [1e-4, 0.5]}]}
    assert (workdir / "run.json").read_bytes() == before, "until the state is known to fit"
    run.record(workdir, meta)
    assert run.read_run(workdir / "run.json") == meta
    # Without the word: the same goes on, and keeps the record; the first settings are another run's by now.
    assert run.claim(workdir, first, step=9) == (meta, [])
    with pytest.raises(UserError, match=r"optim.learning_rate was 0.5, now 0.0001"):
        run.claim(workdir, describe(), step=9)
    other = describe(optim__learning_rate=0.5) | {"data_fingerprint": "0" * 16}
    meta, _ = run.claim(workdir, other, step=9, with_changes=True)
    run.record(workdir, meta)
    assert [list(change) for change in meta["changes"]] == [["step", "optim.learning_rate"], ["step", "data"]]
    assert run.read_run(workdir / "run.json") == meta


def test_what_changes_rounding_is_said(workdir):
    _, lines = run.claim(workdir, describe(training__accumulation=2))
    assert lines == ["the same to rounding: training.accumulation was 1, now 2"]


def test_a_run_older_than_the_mask_decays_as_it_did(tmp_path):
    """Its metadata has no such key; the same command goes on with all parameters, another mask is another run."""
    meta = describe(optim__weight_decay=0.1)
    del meta["config"]["optim"]["decay_mask"]
    run.claim(tmp_path, meta)
    same = tiny.make_config(optim__weight_decay=0.1)
    run.settle(same, tmp_path)
    assert same.optim.decay_mask == "all"
    source = open_source(same.data)
    assert run.claim(tmp_path, run.describe(same, source, source.image_shape, None))[1] == []
    with pytest.raises(UserError, match=r"optim.decay_mask was 'all', now 'matrices'"):
        run.claim(tmp_path, describe(optim__weight_decay=0.1, optim__decay_mask="matrices"))
    new = tiny.make_config()
    run.settle(new, tmp_path / "new")
    assert new.optim.decay_mask == "auto"


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_files_that_no_run_explains_are_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path} holds {name} but no run.json; choose another --workdir"):
        run.claim(tmp_path, describe())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_other_files_are_no_obstacle(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run.claim(tmp_path, describe())
    assert (tmp_path / "run.json").is_file()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write to --workdir={tmp_path}/file"):
        run.claim(tmp_path / "file", describe())
