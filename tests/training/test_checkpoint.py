"""Checkpoints: equal to the bit on any mesh, and one line for everything that can be wrong with them."""

import dataclasses
import gc
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import ONE

from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.training.checkpoint import Checkpoints, arrays, check_place, peek

META = {"config": {"seed": 3}, "class_names": ["a", "b"]}

# What orbax leaves behind when a checkpoint is damaged or the disk is full complains once more, in threads and destructors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def complaints_stay_here():
    yield
    gc.collect()


def two_arrays() -> Model:
    """A model of two arrays: for what does not depend on which they are."""
    return tiny.make_model(
        lambda key: {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros((8,))}, axes={"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    )


@pytest.fixture(scope="module")
def small():
    return tiny.make_trainer(model=two_arrays(), training__extra_ema_decays=(0.5,))


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A run with the checkpoints of steps 1, 2 and 3: states 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, small, (1, 2, 3), keep_last=3)
    return workdir


def save(workdir, trainer, steps, evaluations=None, **options):
    """`evaluations`: step -> (score, how) of those that were evaluated."""
    checkpoints = Checkpoints(workdir, create=True, **options)
    for step in steps:
        score, how = (evaluations or {}).get(step, (None, None))
        evaluation = {} if how is None else {"evaluation": {"score": score, "how": how, "values": {"fid": score}}}
        checkpoints.save(step, tiny.random_state(trainer, step), META | {"step": step} | evaluation)
    checkpoints.wait()
    checkpoints.close()


def test_one_process_alone_reads_the_newest(saved, tmp_path):
    assert peek(saved) == (3, META | {"step": 3})
    assert peek(tmp_path) is None
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "3" / "meta" / "metadata").write_text("{")
    (tmp_path / "run" / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert peek(tmp_path / "run") == (2, META | {"step": 2})


def restore(workdir, trainer, step):
    return Checkpoints(workdir).restore(step, trainer.shapes, trainer.shardings)


def names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


def test_round_trip_onto_other_meshes(tmp_path):
    state = tiny.random_state(tiny.make_trainer((8, 1, 1), model=two_arrays()))
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save(7, state, META)
    checkpoints.wait()
    assert any("mu" in name for name in arrays(state)), "the optimizer's moments are part of it"
    for step, shape in enumerate([(8, 1, 1), (2, 2, 2), ONE, (1, 2, 4)], start=7):
        trainer = tiny.make_trainer(shape, model=two_arrays())
        restored = checkpoints.restore(step, trainer.shapes, trainer.shardings)
        tiny.assert_same(arrays(restored), arrays(state))
        assert jax.tree.map(lambda x: x.sharding, restored) == trainer.shardings
        # What was restored is saved in turn: each mesh reads what the one before wrote.
        checkpoints.save(step + 1, restored, META)
        checkpoints.wait()
    checkpoints.close()


def test_weights_from_elsewhere_are_read_but_not_gone_on_with(small, tmp_path):
    state = tiny.random_state(small)
    params, ema = (jax.tree.map(np.asarray, tree) for tree in (state.params, state.ema))
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save_weights(0, params, ema, META)
    checkpoints.wait()
    for weights, expected in (("ema", ema), ("raw", params)):
        restored = checkpoints.restore_weights(0, weights, small.shapes.params, small.shardings.params)
        jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert checkpoints.meta(0) == META
    with pytest.raises(UserError, match="missing opt/") as error:
        checkpoints.restore(0, small.shapes, small.shardings)
    one_line(error)


def test_arrays_name_every_leaf(small):
    state = tiny.random_state(small)
    assert len(arrays(state)) == len(jax.tree.leaves(state))
    assert {"step", "params/kernel", "ema/bias", "skipped"} < set(arrays(state))


def test_later_changes_do_not_reach_a_checkpoint(small, tmp_path):
    """save() returns when the arrays may be donated: the step that follows overwrites them."""
    checkpoints = Checkpoints(tmp_path, create=True)
    state = tiny.random_state(small)
    expected = {name: value.copy() for name, value in arrays(state).items()}
    checkpoints.save(1, state, META)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    checkpoints.wait()
    checkpoints.close()
    tiny.assert_same(arrays(restore(tmp_path, small, 1)), expected)


@pytest.mark.parametrize(("weights", "field"), [("ema", "ema"), ("raw", "params")])
def test_weights_alone(saved, small, weights, field):
    trainer = tiny.make_trainer((1, 2, 4), model=two_arrays())
    restored = Checkpoints(saved).restore_weights(2, weights, trainer.shapes.params, trainer.shardings.params)
    tiny.assert_same(restored, getattr(tiny.random_state(small, 2), field))
    assert jax.tree.map(lambda x: x.sharding, restored) == trainer.shardings.params


def test_unknown_weights(saved, small):
    with pytest.raises(UserError, match=r"unknown --weights=best; this checkpoint has ema, ema_0\.5, raw"):
        Checkpoints(saved).restore_weights(2, "best", small.shapes.params, small.shardings.params)


def test_meta(saved):
    assert Checkpoints(saved).meta(2) == META | {"step": 2}


@pytest.mark.parametrize(
    "name", ["my run", "run#1", "run%20", "{run}", "l\u00e4uf", "a:b", "it's", "run[1]", "run*", "run?", "a\\b"]
)
def test_a_checkpoint_is_read_back_from_any_place_that_is_not_refused(small, tmp_path, name):
    if set(name) & set("[*?\\"):
        with pytest.raises(UserError, match=r"could not be read back; choose another"):
            check_place(tmp_path / name)
        return
    check_place(tmp_path / name)
    save(tmp_path / name, small, (1,))
    restored = Checkpoints(tmp_path / name).restore(1, small.shapes, small.shardings)
    tiny.assert_same(restored, tiny.random_state(small, 1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, ["7"]),
        ({"keep_last": 3}, ["5", "6", "7"]),
        ({"keep_last": 2, "keep_every": 3}, ["3", "6", "7"]),
    ],
    ids=str,
)
def test_what_is_kept(small, tmp_path, options, kept):
    save(tmp_path, small, range(1, 8), **options)
    assert names(tmp_path) == kept
    assert Checkpoints(tmp_path).latest() == 7


@pytest.mark.parametrize(
    ("evaluations", "kept", "best"),
    [
        ({2: 0.5, 4: 0.7}, ["2", "7"], 2),
        ({2: 0.5, 4: 0.3, 6: 0.4}, ["4", "7"], 4),
        ({2: -1.0, 4: -1.0, 6: 0.0}, ["2", "7"], 2),  # the earlier of equals
        ({2: 0.5, 7: 0.1}, ["7"], 7),
        ({2: 0.1, 4: (0.5, "b"), 6: (0.6, "b")}, ["4", "7"], 4),  # what was measured otherwise does not compare
    ],
    ids=str,
)
def test_the_best_is_kept(small, tmp_path, evaluations, kept, best):
    evaluations = {step: of if isinstance(of, tuple) else (of, "a") for step, of in evaluations.items()}
    # A run that goes on knows what was best before.
    for steps in ((1, 2, 3), (4, 5, 6, 7)):
        save(tmp_path, small, steps, evaluations, keep_last=1)
    assert names(tmp_path) == kept
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.choose("best") == best and checkpoints.best() == (best, {"fid": evaluations[best][0]})
    assert checkpoints.latest() == 7
    tiny.assert_same(restore(tmp_path, small, best), tiny.random_state(small, best))


def test_choose(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.choose(None) == checkpoints.choose("newest") == 3
    assert checkpoints.choose(2) == checkpoints.choose("2") == 2
    for step in (9, "9", "last"):
        with pytest.raises(
            UserError, match=rf"no checkpoint of step {step} in .*checkpoints; there are 1, 2, 3; or give newest or best"
        ):
            checkpoints.choose(step)
    assert checkpoints.best() is None
    with pytest.raises(UserError, match=r"there is no best one .*; there are 1, 2, 3") as error:
        checkpoints.choose("best")
    assert "evaluation.every" in one_line(error)


def test_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match=rf"no checkpoints in {tmp_path}; train there first, or give .*directory of another run"):
        Checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    empty = Checkpoints(tmp_path, create=True)
    assert empty.latest() is None
    with pytest.raises(UserError, match=r"no finished checkpoint in .* yet; train longer"):
        empty.choose(None)


def wider(state):
    return dataclasses.replace(state, params=state.params | {"kernel": jax.ShapeDtypeStruct((8, 12), np.float32)})


def without_bias(state):
    return dataclasses.replace(state, params={"kernel": state.params["kernel"]})


def with_another(state):
    return dataclasses.replace(state, params=state.params | {"gain": state.params["bias"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"params/kernel has shape \(8, 8\), not \(8, 12\)"),
        (without_bias, "extra params/bias"),
        (with_another, "missing params/gain"),
    ],
)
def test_misfits_are_named(saved, small, change, message):
    checkpoints = Checkpoints(saved)
    shapes = change(small.shapes)
    shardings = jax.tree.map(lambda _: small.shardings.step, shapes)
    with pytest.raises(UserError, match=rf"checkpoint {saved}/checkpoints/2 does not fit the model: {message}") as error:
        checkpoints.restore(2, shapes, shardings)
    one_line(error)
    with pytest.raises(UserError, match=f"does not fit the model: {message}"):
        checkpoints.restore_weights(2, "raw", shapes.params, shardings.params)
    # The other weights fit as before: only what is asked for is looked at.
    checkpoints.restore_weights(2, "ema", small.shapes.params, small.shardings.params)


def test_many_misfits_are_counted(saved):
    trainer = tiny.make_trainer()
    with pytest.raises(UserError, match=r"missing ema/blocks/adaLN/bias; (.*; ){3}.* and \d+ more$") as error:
        restore(saved, trainer, 2)
    one_line(error)


def damaged(saved, tmp_path, path: str, size: int | None):
    """A copy of the run as earlier versions saved it, in which one file of step 3 is cut to `size` bytes, or gone."""
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints", ignore=shutil.ignore_patterns("checksums.json"))
    file = tmp_path / "checkpoints" / "3" / path
    if size is None:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    else:
        os.truncate(file, size)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "size"),
    [
        *((path, size) for path in ("state/_METADATA", "state/manifest.ocdbt") for size in (None, 0, 20)),
        ("state", None),
        ("state/d", None),
    ],
)
def test_damage_is_named(saved, small, tmp_path, path, size):
    workdir = damaged(saved, tmp_path, path, size)
    for read in (
        lambda: restore(workdir, small, 3),
        lambda: Checkpoints(workdir).restore_weights(3, "ema", small.shapes.params, small.shardings.params),
    ):
        with pytest.raises(UserError, match=rf"checkpoint {workdir}/checkpoints/3 cannot be read .*; remove that dir") as error:
            read()
        one_line(error)
    # The way out that the message names.
    shutil.rmtree(workdir / "checkpoints" / "3")
    assert Checkpoints(workdir).choose(None) == 2
    tiny.assert_same(restore(workdir, small, 2), tiny.random_state(small, 2))


@pytest.mark.parametrize("size", [None, 0, 4], ids=["gone", "empty", "cut"])
def test_damaged_meta_is_named(saved, tmp_path, size):
    workdir = damaged(saved, tmp_path, "meta/metadata", size)
    with pytest.raises(UserError, match=rf"checkpoint {workdir}/checkpoints/3 cannot be read") as error:
        Checkpoints(workdir).meta(3)
    one_line(error)


def test_no_damage_gives_other_numbers(saved, small, tmp_path):
    """Whichever file is cut in half, restoring fails as above or gives the very bits that were saved."""
    expected, failed = tiny.random_state(small, 3), 0
    checkpoint = damaged(saved, tmp_path, "commit_success.txt", 0) / "checkpoints" / "3"
    files = [p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()]
    assert len(files) > 10
    for i, path in enumerate(files):
        size = (saved / "checkpoints" / "3" / path).stat().st_size
        try:
            restored = restore(damaged(saved, tmp_path / str(i), str(path), size // 2), small, 3)
        except UserError:
            failed += 1
        else:
            tiny.assert_same(restored, expected)
    assert failed > 3


def test_what_a_killed_save_left_is_ignored_and_removed(saved, small, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    # As orbax names it until all is on disk.
    partial = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", partial)

    reading = Checkpoints(tmp_path)
    assert reading.latest() == reading.choose(None) == 3
    tiny.assert_same(restore(tmp_path, small, 3), tiny.random_state(small, 3))
    assert partial.is_dir(), "who only reads removes nothing: another process may be writing it"

    save(tmp_path, small, [4], keep_last=4)
    assert names(tmp_path) == ["1", "2", "3", "4"]
    tiny.assert_same(restore(tmp_path, small, 4), tiny.random_state(small, 4))


def test_a_kill_in_a_removal_leaves_none_half_there(small, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def killed(path, *args, **options):
        for part in Path(path).rglob("meta"):
            remove(part)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        save(tmp_path, small, [1, 2], keep_last=1)
    assert names(tmp_path)[0] == "2", "the first was to go"
    save(tmp_path, small, [3], keep_last=2)
    assert names(tmp_path) == ["2", "3"]


def test_full_disk(small_disk):
    disk, resize = small_disk
    trainer = tiny.make_trainer()  # large enough that a checkpoint is mostly arrays
    resize(1 << 16)
    save(disk, trainer, [1])
    used = shutil.disk_usage(disk).used // 1024
    resize(used + used // 2)

    checkpoints = Checkpoints(disk, keep_last=2, create=True)
    with pytest.raises(UserError, match=f"could not write a checkpoint to {disk}/checkpoints: no space left") as error:
        checkpoints.save(2, tiny.random_state(trainer, 2), META)
        checkpoints.wait()
    assert "the earlier checkpoints are intact" in one_line(error)

    # Half of step 2 still fills the disk; what was there before is as it was.
    assert Checkpoints(disk).choose(None) == 1
    tiny.assert_same(restore(disk, trainer, 1), tiny.random_state(trainer, 1))

    resize(1 << 16)  # "free some disk space and run the same command again"
    save(disk, trainer, [2], keep_last=2)
    assert names(disk) == ["1", "2"]
    tiny.assert_same(restore(disk, trainer, 2), tiny.random_state(trainer, 2))
