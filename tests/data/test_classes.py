"""Classes that a user chooses, by name or number."""

import pytest

from speedit_jax.data.classes import choose
from speedit_jax.errors import UserError

NAMES = ("crane", "10", "crane", "dog")


def test_names_and_numbers():
    assert choose(NAMES, "dog, 10,2") == [3, 1, 2]
    assert choose(NAMES, "") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("dog,crane", "data.classes=dog,crane: the classes 0, 2 are all called 'crane'; give the number"),
        ("4", "data.classes=4: no class '4'; the classes are 0..3: crane, 10, crane, dog$"),
        ("dog,3", "data.classes=dog,3: '3' is given twice"),
    ],
)
def test_what_is_not_clear(wanted, message):
    with pytest.raises(UserError, match=message):
        choose(NAMES, wanted)
