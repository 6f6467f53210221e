"""The step of a run with SPRINT, and what starts from its weights."""

import contextlib

import jax
import numpy as np
import pytest
import tiny

from speedit_jax.data.description import Description
from speedit_jax.errors import UserError
from speedit_jax.models.routing import Route
from speedit_jax.training import run as runs
from speedit_jax.training.checkpoint import Checkpoints
from speedit_jax.training.finetune import start_from, starting_weights
from speedit_jax.training.inputs import make_draw, stream

PLACE = {"tokens__start": 1, "tokens__tail": 1, "model__depth": 4}
SPRINT = PLACE | {"tokens__method": "sprint", "tokens__rate": 0.75, "tokens__path_drop": 0.4}
NAMES = tuple(map(str, range(tiny.CLASSES)))


def test_a_mesh_drops_the_paths_that_the_key_says():
    """Those of their own stream of the step's key."""
    trainer = tiny.make_trainer((2, 2, 2), **SPRINT)
    draw = make_draw(trainer.model, trainer.diffusion, trainer.strategy, trainer.config, None, None)
    state, batch, key = trainer.state(tiny.random_like(trainer.shapes.params)), tiny.random_batch(), jax.random.key(3)
    with jax.set_mesh(trainer.mesh):
        drawn = jax.jit(lambda *of: draw(*of)[1]["dropped"])(state, jax.device_put(batch, trainer.rows), key)
    expected = np.asarray(jax.random.bernoulli(stream(key, "path_drop"), 0.4, (tiny.BATCH,)))
    assert 0 < expected.sum() < tiny.BATCH
    np.testing.assert_array_equal(drawn, expected)


def test_a_step_and_the_next_one_after_resuming(tmp_path):
    """All learns, the fusion and the mask token, too; the same step again and from a checkpoint is the same to the bit."""
    trainer = tiny.make_trainer(**SPRINT, training__accumulation=2)
    step, key = trainer.train_step(), jax.random.key(0)
    state = trainer.state(tiny.random_like(trainer.shapes.params))
    after, metrics = step(state, tiny.random_batch(), key)
    tiny.assert_same((after, metrics), step(state, tiny.random_batch(), key))
    for name, error in tiny.relative_errors(after.params, state.params).items():
        assert 0 < error < 0.1, name
    assert sorted(after.ema["sprint"]) == ["fusion", "mask"]
    with contextlib.closing(Checkpoints(tmp_path, create=True)) as checkpoints:
        checkpoints.save(1, after, {})
        checkpoints.wait()
        restored = checkpoints.restore(1, trainer.shapes, trainer.shardings)
    tiny.assert_same(*(step(of, tiny.random_batch(1), key) for of in (restored, after)))


def write_run(workdir, **changes):
    """Weights that a run of `changes` could have saved; returns the parameters."""
    config, source = tiny.make_config(**changes), Description(tiny.IMAGE, NAMES, fingerprint="f")
    meta = runs.describe(config, source, source.image_shape, None)
    params = tiny.random_like(tiny.make_trainer(**changes).shapes.params)
    runs.claim(workdir, meta)
    with contextlib.closing(Checkpoints(workdir, create=True)) as checkpoints:
        checkpoints.save_weights(4, params, params, meta)
        checkpoints.wait()
    return params


def started(workdir, **changes):
    """(parameters of a run that starts from those in `workdir`, its trainer, the lines for the user)."""
    trainer = tiny.make_trainer(**changes)
    weights, lines = starting_weights(str(workdir), trainer, NAMES)
    return start_from(trainer.initial_state(jax.random.key(1)), weights).params, trainer, lines


def test_starts_from_a_plain_run_as_the_same_network(tmp_path):
    plain = write_run(tmp_path / "run", **PLACE | {"tokens__method": "route"})
    params, trainer, lines = started(tmp_path / "run", **SPRINT)
    assert any("mask token and fusion start anew" in line for line in lines)
    sprint = jax.tree.map(np.asarray, params.pop("sprint"))
    tiny.assert_same(params, plain)
    np.testing.assert_array_equal(sprint["fusion"]["kernel"], np.eye(64, 32))
    assert not sprint["fusion"]["bias"].any() and 0.01 < sprint["mask"].std() < 0.03
    # So it computes what the plain network does: tests/models/test_sprint.py.
    assert trainer.model.path_drop == 0.4


def test_dense_fine_tuning_takes_everything_over(tmp_path):
    before = write_run(tmp_path / "run", **SPRINT)
    params, trainer, lines = started(tmp_path / "run", **SPRINT | {"tokens__rate": 0.0})
    tiny.assert_same(params, before)
    assert not any("sprint" in line for line in lines)
    assert trainer.model.kept is None and trainer.model.path_drop == 0.4
    assert trainer.model.step_flops == 3 * trainer.model.forward_flops
    for changes, message in (
        ({"tokens__method": "none"}, r"whose fusion this run lacks: set --config\.tokens\.method=sprint"),
        ({"tokens__start": 2}, r"tokens\.start was 1, now 2\): set --config\.tokens\.start=1"),
    ):
        with pytest.raises(UserError, match=message):
            started(tmp_path / "run", **SPRINT | changes)


@pytest.mark.slow
def test_the_teacher_of_alignment_sees_all_tokens():
    """It is compared at those that the student's middle blocks see, and has no dropped images."""
    align = {"regularizer__align": 0.5, "regularizer__align_depth": 2, "regularizer__align_teacher_depth": 3}
    trainer = tiny.make_trainer(**SPRINT | align)
    seen = []
    apply = trainer.model.apply

    def spy(params, *args, **options):
        seen.append(options)
        return apply(params, *args, **options)

    object.__setattr__(trainer.model, "apply", spy)
    _, metrics = trainer.train_step()(trainer.initial_state(jax.random.key(0)), tiny.random_batch(), jax.random.key(0))
    assert np.isfinite(metrics["align"]) and 0 < metrics["align"] < 2
    student, teacher = seen
    assert isinstance(student["route"], Route) and student["dropped"].shape == (tiny.BATCH,)
    assert sorted(teacher) == ["taps"]
