"""The program `speedit`: runs a command by its name. `speedit train ...` is `python -m speedit_jax.train ...`."""

import ast
import runpy
import sys
from pathlib import Path

from speedit_jax import __version__
from speedit_jax.errors import did_you_mean

HELP = """Usage: speedit COMMAND [--FLAG=VALUE ...]

{commands}

speedit COMMAND --help explains a command and its flags; speedit --version prints the version.
"""


def commands() -> dict[str, str]:
    """{name: first line of the docstring} of every module that runs as a command. Reads the files and imports none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> int | str | None:
    """The exit code; a text is an error, which Python prints."""
    name, *arguments = sys.argv[1:] or ["--help"]
    known = commands()
    if name in ("--help", "-h", "help"):
        width = max(map(len, known))
        print(HELP.format(commands="\n".join(f"  {command:<{width}}  {summary}" for command, summary in known.items())), end="")
        return None
    if name == "--version":
        return print(__version__)
    if name not in known:
        if name.startswith("-"):
            return f"error: {name!r} stands where a command is expected: speedit COMMAND --FLAG=VALUE; see speedit --help"
        return f"error: unknown command {name!r}; {did_you_mean(name, known)}speedit --help lists the commands"
    sys.argv[1:] = arguments
    runpy.run_module(f"speedit_jax.{name}", run_name="__main__", alter_sys=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
