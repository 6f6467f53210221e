"""Names of files, which may be any bytes, as text."""

import re
from pathlib import Path

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(name: str | Path) -> str:
    """A file name as text that prints on one line: \\xe9 for a byte that is not UTF-8, \\n for a line break."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
