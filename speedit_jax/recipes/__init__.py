"""Configs that are installed: --config=NAME or --config=NAME:ARGUMENT finds NAME.py in this directory."""

from collections.abc import Sequence
from pathlib import Path

from speedit_jax.errors import UserError, did_you_mean

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("[!_]*.py"))


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with the file of a recipe in place of its name.

    Raises:
      UserError: --config names neither a file nor a recipe.
    """
    expanded = list(argv)
    for i, argument in enumerate(expanded):
        flag, equals, value = argument.partition("=")
        if equals and flag in ("--config", "-config"):
            expanded[i] = f"{flag}={_file(value)}"
        elif i and expanded[i - 1] in ("--config", "-config"):
            expanded[i] = _file(argument)
    return expanded


def _file(spec: str) -> str:
    """What stands before the colon is a recipe's name if it has neither a directory nor a suffix."""
    name, colon, argument = spec.partition(":")
    if not name or "/" in name or Path(name).suffix or Path(name).is_file():
        return spec
    if name not in names():
        meant = did_you_mean(name, names())
        raise UserError(f"--config={name}: no such recipe; {meant}the recipes are {', '.join(names())}; a file ends in .py")
    return f"{HERE / name}.py{colon}{argument}"
