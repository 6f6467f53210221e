"""The text of a compiled XLA module, read into computations of instructions."""

import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype not in _BYTES and not (bits := re.search(r"\d+", self.dtype)):
            return 0  # a token
        return int(self.size * (_BYTES.get(self.dtype) or int(bits[0]) / 8))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      arrays: of the result, a tuple's in their order.
      operands: names of instructions of the same computation.
      attributes: the rest of the line.
    """

    name: str
    root: bool
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the program it comes from: jit(step)/jvp(Backbone)/while/body/..."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def dims(self, name: str) -> tuple[int, ...]:
        """Of an attribute like lhs_contracting_dims={1}."""
        return tuple(int(d) for d in (self.attribute(rf"{name}={{([\d,]*)}}") or "").split(",") if d)


# name -> its instructions by name, in their order
Module = dict[str, dict[str, Instruction]]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({") - (text[i] in ")}")
        if not depth:
            return i
    raise ValueError(f"no end of {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    start = match.end()
    shape_end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    found = _ARRAY.findall(line[start:shape_end])
    arrays = tuple(Array(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in found)
    opens = line.index("(", shape_end)
    closes = _closing(line, opens)
    operands = tuple(_OPERAND.findall(line[opens:closes]))
    return Instruction(match[2], bool(match[1]), arrays, line[shape_end:opens].strip(), operands, line[opens:])


def parse(text: str) -> tuple[Module, str]:
    """(the computations, the entry's name) of `compiled.as_text()`."""
    module: Module = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = module.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _instruction(line)):
            current[found.name] = found
    return module, entry
