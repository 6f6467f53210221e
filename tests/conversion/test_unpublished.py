"""Parts of a network that no published format can store."""

from pathlib import Path

import pytest

from speedit_jax.config import get_config
from speedit_jax.conversion.exporting import refuse_unpublished
from speedit_jax.errors import UserError

PARTS = {"qk_norm": True, "rope": True, "patch_bottleneck": 4, "mlp": "swiglu", "norm": "rms"}


@pytest.mark.parametrize("part", PARTS)
def test_each_is_refused_by_its_name(part):
    model = get_config().model
    refuse_unpublished(Path("runs/a"), "DiT", model)
    model[part] = PARTS[part]
    with pytest.raises(UserError, match=rf"runs/a was trained with model\.{part}.*no published format"):
        refuse_unpublished(Path("runs/a"), "DiT", model)


def test_digs_own_rms_norm_is_published():
    model = get_config().model
    model.norm = "rms"
    refuse_unpublished(Path("runs/a"), "DiG", model)
