"""Training on the accelerator that is there, with its kernels and in bfloat16: `pytest -m tpu` or `-m gpu`."""

import jax
import numpy as np
import pytest
import tiny


def losses(**changes):
    """Of six steps on one batch, from random weights."""
    trainer = tiny.make_trainer(model__dtype="bfloat16", optim__learning_rate=1e-3, **changes)
    state, step = trainer.state(tiny.random_like(trainer.shapes.params)), trainer.train_step()
    found = []
    for i in range(6):
        state, metrics = step(state, tiny.random_batch(), jax.random.key(i))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.tpu
@pytest.mark.gpu
@pytest.mark.parametrize("name, mixer", [("DiT-tiny/2", "attention"), ("DiG-tiny/2", "gla")])
def test_the_kernels_train_as_plain_xla_does(name, mixer):
    if jax.default_backend() == "cpu":
        pytest.skip("on a CPU both are plain XLA; pytest -m tpu or -m gpu")
    kernel, plain = (losses(model__name=name, **{f"model__{mixer}": choice}) for choice in ("auto", "xla"))
    assert np.all(np.isfinite(plain)) and plain.std() > 0
    # Activations hold 8 bits: a relative 4e-3 each, over a depth of two blocks and six steps.
    np.testing.assert_allclose(kernel, plain, rtol=3e-2)
