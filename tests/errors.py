"""What a mistake is to look like."""

import pytest

from speedit_jax.errors import UserError


def assert_one_line(call, *words):
    """It raises a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
