"""The smallest DiT that every mesh below divides, and the parts of a trainer around it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import DescribedFeatures, DescribedTexts, Description
from speedit_jax.models.build import Model
from speedit_jax.training import assembly
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.state import TrainState

ONE = (1, 1, 1)  # one device: what all meshes are compared with
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2))  # (data, fsdp, tensor)
IMAGE = (8, 8, 1)
CLASSES = 10
BATCH = 16
# Captions of at most 8 tokens, of which "" has two.
TEXTS = DescribedTexts({"encoder": "tiny", "pooled": False}, 16, 8, False, (np.ones((2, 16), np.float16), 2))

TINY = {
    "data.height": IMAGE[0],
    "data.width": IMAGE[1],
    "data.channels": IMAGE[2],
    "data.synthetic_size": 64,
    "model.name": "DiT-tiny/2",
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 4,
    "training.batch_size": BATCH,
    "training.num_steps": 100,
    "training.sample_every": 0,
}


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    """base.py with TINY and `changes`, whose keys are written with __ for the dot."""
    config = get_config()
    config.update_from_flattened_dict(TINY | {key.replace("__", "."): value for key, value in changes.items()})
    return config


def make_mesh(shape: tuple[int, int, int]) -> Mesh:
    return sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: int(np.prod(shape))])


class Trainer(Assembly):
    """What train.py puts together before its first step, and what tests do with it."""

    def train_step(self, compiler_options: dict[str, Any] | None = None):
        """The step of train.py, but without the donation: tests look at the state before, too."""
        jitted = self.jit_step(donate=False, compiler_options=compiler_options)

        def run(state, batch, key):
            with jax.set_mesh(self.mesh):
                return jitted(state, jax.device_put(batch, self.rows), key)

        return run

    def state(self, params: Any) -> TrainState:
        """The state before the first step, but with these parameters."""
        zero = jnp.zeros((), jnp.int32)
        heads = random_like(self.shapes.heads, seed=1, dtype=jax.tree.leaves(params)[0].dtype)
        state = TrainState(
            zero,
            params,
            params,
            dict.fromkeys(self.shapes.extra_ema, params),
            self.optimizer.init(params | heads),
            self.strategy.init(),
            zero,
            zero,
            heads,
        )
        return jax.device_put(state, self.shardings)


def make_model(init, **fields: Any) -> Model:
    """The network, but with these parameters; and `fields` of Model."""
    model = assembly.make_model(make_config(), make_mesh(ONE), IMAGE, CLASSES)
    return dataclasses.replace(model, init=init, **fields)


def make_trainer(
    shape: tuple[int, int, int] = ONE,
    model: Model | None = None,
    strategy=None,
    optimizer=None,
    texts=None,
    features=None,
    **changes,
):
    """A trainer on a mesh of `shape`, on classes or on `texts`, perhaps with features (h, w, F); given parts replace those of the
    config."""
    of_images = features and DescribedFeatures(features)
    data = Description(IMAGE, tuple(map(str, range(CLASSES))), texts=texts, features=of_images)
    parts = assemble(make_config(**changes), data, make_mesh(shape))
    given = {"model": model, "strategy": strategy, "optimizer": optimizer}
    fields = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
    return Trainer(**fields | {name: part for name, part in given.items() if part is not None})


def random_like(shapes: Any, seed: int = 0, dtype=np.float32) -> Any:
    """Normal numbers of scale 0.1: no leaf is zero, adaLN's and the last layer's included, so every gradient is at work."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(dtype), shapes)


def random_state(trainer: Trainer, seed: int = 0) -> TrainState:
    """Every array of a state at random, integers too: for what only moves arrays about."""
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda s: np.asarray(100 * rng.normal(size=s.shape)).astype(s.dtype), trainer.shapes)
    return jax.device_put(state, trainer.shardings)


def random_batch(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(-1, 1, (BATCH, *IMAGE)).astype(dtype),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def relative_errors(tree: Any, reference: Any) -> dict[str, float]:
    """{"path/of/leaf": |leaf - reference| / |reference|} in the L2 norm."""
    errors = {}
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors[jax.tree_util.keystr(path, simple=True, separator="/")] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    return errors


def assert_same(a: Any, b: Any) -> None:
    """Equal trees, to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path, simple=True, separator="/")
