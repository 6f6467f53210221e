"""UserError: an error that the user can fix; its text is the whole message."""


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the way out; commands print it and exit with 1."""
