"""Skipped steps: what was not finite, the batch or the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from speedit_jax.errors import UserError
from speedit_jax.training.nonfinite import Skips


@pytest.fixture(scope="module")
def parts():
    parts = tiny.make_trainer(training__max_skipped_in_a_row=3, training__log_every=2)
    parts.config.data.vae = "weights/vae"
    return parts


def batch(parts, bad=False, name="image"):
    values = tiny.random_batch()["image"]
    if bad:
        values[3, 2, 1, 0] = np.inf
    return jax.device_put({name: values, "label": np.zeros(tiny.BATCH, np.int32)}, parts.rows)


def metrics(step, skipped, in_a_row):
    return {"step": step, "skipped": float(skipped), "skipped_in_a_row": float(in_a_row)}


def test_nothing_is_said_of_finite_steps(parts):
    skips = Skips(parts, skipped=0)
    skips.look(1, batch(parts))
    assert skips.check(None) is None and skips.check(metrics(1, 0, 0)) is None
    assert skips.summary() is None


@pytest.mark.parametrize("name", ["image", "moments"])
def test_a_batch_is_told_from_a_gradient(parts, name):
    skips = Skips(parts, skipped=0)
    for step, bad in ((1, False), (2, True), (3, False), (4, False), (5, True), (6, False)):
        skips.look(step, batch(parts, bad, name))
    # Metrics are read late: steps 5 and 6 are looked at already, and not counted yet.
    warning = skips.check(metrics(4, 2, 0))
    assert warning.startswith(
        "warning: 1 step was skipped because the batch was not finite and 1 step was skipped because the gradient was not finite"
    )
    assert "3 in a row end the run" in warning
    assert skips.check(metrics(6, 3, 0)) is None, "the first warning is the last"
    assert skips.summary() == (
        "2 steps were skipped because the batch was not finite and 1 step was skipped because the gradient was not finite"
    )


def test_too_many_batches(parts):
    skips = Skips(parts, skipped=0)
    for step in range(1, 5):
        skips.look(step, batch(parts, bad=step > 1))
    with pytest.raises(UserError, match=r"3 of the last 3 batches held numbers that are not finite") as error:
        skips.check(metrics(4, 3, 3))
    assert "check the data synthetic or the VAE weights/vae; the learning rate is not to blame" in str(error.value)
    assert "\n" not in str(error.value)


def test_too_many_gradients(parts):
    skips = Skips(parts, skipped=0)
    for step in range(1, 5):
        skips.look(step, batch(parts, bad=step == 1))
    with pytest.raises(UserError, match=r"the last 3 gradients were not finite \(training.max_skipped_in_a_row=3\)") as error:
        skips.check(metrics(4, 4, 3))
    assert "from step 1 on, lower optim.learning_rate" in str(error.value) and "--continue_with_changes" in str(error.value)


def test_those_before_this_start_are_counted_apart(parts):
    skips = Skips(parts, skipped=4)
    assert skips.summary() == "4 steps were skipped before this start"
    skips.look(9, batch(parts))
    assert skips.check(metrics(9, 5, 1)) is not None
    assert skips.summary() == "1 step was skipped because the gradient was not finite; 4 steps were skipped before this start"


def test_the_step_skips_what_is_not_finite(parts):
    """With the real step: the counts that it returns are those that `check` reads."""
    step, key = parts.train_step(), jax.random.key(0)
    state, skips = parts.initial_state(key), Skips(parts, skipped=0)
    for number, bad in enumerate((False, True, False), start=1):
        given = batch(parts, bad)
        state, found = step(state, given, key)
        skips.look(number, given)
    assert bool(jnp.isfinite(found["loss"]))
    skips.check({"step": 3} | {name: float(value) for name, value in found.items()})
    assert skips.summary() == "1 step was skipped because the batch was not finite"
