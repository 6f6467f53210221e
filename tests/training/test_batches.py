"""What a source raises becomes one line, after the batches before it."""

import pytest
import tiny

from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError
from speedit_jax.training.batches import batches


class Broken:
    """A source of which a record cannot be read, met in the third of its four batches or the fourth."""

    def __init__(self, error: Exception):
        self._source, self._error = open_source(tiny.make_config().data), error
        self.encoded_by, self._read = None, 0

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self._read += 1
        if self._read > 2.5 * tiny.BATCH:
            raise self._error
        return self._source[index]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), r"an example of data.source=synthetic cannot be read: OSError: .*Input/output error"),
        (ValueError("bad record\nin many lines"), "cannot be read: ValueError: bad record$"),
        (MemoryError(), "cannot be read: MemoryError: MemoryError"),
        (
            UserError("image 3 is damaged; mend it"),
            "^image 3 is damaged; mend it; if you change the data, resume with --continue_with",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_the_source(error, message):
    parts = tiny.make_trainer(data__threads=0)
    found = []
    with pytest.raises(UserError, match=message) as raised:
        found.extend(batch["label"].shape for batch in batches(parts, Broken(error), 0, 10))
    assert "\n" not in str(raised.value)


def test_batches_before_the_error_come():
    parts, found = tiny.make_trainer(data__threads=0), []
    with pytest.raises(UserError):
        for batch in batches(parts, Broken(OSError("no")), 0, 10):
            found.append(batch["label"].shape)
    assert found == [(tiny.BATCH,)] * 2
