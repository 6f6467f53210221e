"""DiG's switches; tests/test_dig_parity.py holds the network against the published code."""

import jax
import pytest

from speedit_jax.config import get_config
from speedit_jax.errors import UserError
from speedit_jax.models.build import build


def make(**keys):
    config = get_config().model
    config.update({"name": "DiG-tiny/1", "width": 16, "depth": 4, "heads": 2} | keys)
    return build(config, image_shape=(4, 6, 1), num_classes=3, learned_variance=False, platform="cpu")


def names(**keys):
    shapes = jax.eval_shape(make(**keys).init, jax.random.key(0))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}


def test_ablations_change_the_parameters():
    assert "blocks/block_3/conv/kernel" in names()
    assert "blocks/block_0/norm1/weight" in names(norm="rms")
    assert not any("conv" in name for name in names(convolution="none"))
    # Two directions repeat after two blocks; blocks that no whole period holds follow.
    assert not any("block_2" in name for name in names(directions=2))
    assert "rest_0/attention/q/kernel" in names(depth=5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"directions": 3}, r"model\.directions 3; choose one of 1, 2, 4"),
        ({"convolution": "big"}, r"model\.convolution 'big'"),
        ({"norm": "batch"}, r"model\.norm 'batch'"),
        ({"gla": "fast"}, r"model\.gla 'fast'; choose one of auto, reference, xla, pallas_tpu, pallas_gpu"),
        ({"heads": 3}, r"DiG wants a multiple of 4 and of 6"),
    ],
)
def test_user_errors_name_the_key(keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)
