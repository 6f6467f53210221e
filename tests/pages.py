"""The pages for readers, and the blocks of code on them."""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELL, PYTHON, TEXT = ("", "bash", "sh"), ("python",), ("text",)
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """Of no language: commands of a shell. What a program prints is `text`."""

    page: str  # relative to ROOT
    line: int  # of its first line of code
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    return [Block(name, text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in FENCED.finditer(text)]


def commands(block: Block) -> list[str]:
    """The lines of a shell's block, each whole."""
    return [line for line in block.code.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")]
