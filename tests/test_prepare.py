"""The prepare command's mistakes; what it does right is in tests/data/test_tfds.py."""

from commands import assert_fails


def test_a_mistake_is_one_line(run):
    assert_fails(run("prepare"), "--name is missing")
    assert_fails(run("prepare", "--name=no_such_set"), "cannot prepare no_such_set", "tensorflow.org")
