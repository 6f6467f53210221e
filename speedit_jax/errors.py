"""UserError: an error that the user can fix; its text is the whole message."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the way out; commands print it and exit with 1."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """'did you mean X? ' of the most similar known name, to stand in a message; '' if none is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
