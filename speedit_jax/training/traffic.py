"""The collectives of a compiled program, read off its text: what one device exchanges with the others in one call."""

import collections
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # the kind of a transfer over the network between TPU slices

_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_TRANSFER = re.compile(r'= \((\w+)\[([\d,]*)\].*? send\(.*_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|(?:called|branch)_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
_LOOP = re.compile(r" while\(%([\w.-]+)\), condition=%([\w.-]+), body=%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r"= s32\[\]\S* get-tuple-element\(.*index=(\d+)")
_BITS = re.compile(r"\d+")

Arrays = list[tuple[str, tuple[int, ...]]]


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d)


def _exchanged(line: str) -> tuple[str, Arrays] | None:
    """(kind, [(dtype, dimensions) of each of one device's results]) of a line that is a collective."""
    if match := _TRANSFER.search(line):
        return BETWEEN_SLICES, [(match[1], _dims(match[2]))]
    if not (match := _COLLECTIVE.search(line)):
        return None
    arrays = [(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(match[1])]
    if match[3] and match[2] != "all-reduce":
        # An asynchronous start shows its operands first, and what the machine needs last.
        arrays = [array for array in arrays if array[1] or array[0] != "u32"]
        arrays = arrays[len(arrays) // 2 :]
    return match[2], arrays


def collectives(text: str) -> Iterator[tuple[str, Arrays]]:
    """(kind, [(dtype, dimensions) of each of one device's results]) of every collective in a compiled module's text."""
    yield from filter(None, map(_exchanged, text.splitlines()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: its lines}, the name of the one where the program starts)."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            lines = found[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return found, entry


def _group_size(line: str) -> int:
    """How many devices a collective joins, as far as its line says."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(_dims(match[1]))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'\w+'", match[2]))
    return 1


def _trips(loop: str, caller: list[str], condition: list[str]) -> int:
    """How often a loop runs, as its line says or, on TPUs, its counter's start and limit; 1 where nothing says it."""
    if match := _TRIPS.search(loop):
        return int(match[1])
    limits, counters = (pattern.findall("\n".join(condition)) for pattern in (_CONSTANT, _COUNTER))
    if len(limits) != 1 or len(counters) != 1:
        return 1
    defined = {line.partition(" = ")[0].split()[-1]: line for line in caller if " = " in line}
    carried = re.findall(r"%[\w.-]+", defined.get(f"%{_LOOP.search(loop)[1]}", "").partition(" tuple(")[2])
    start = defined.get(carried[int(counters[0])], "") if carried else ""
    while match := re.search(r" copy\((%[\w.-]+)\)", start):
        start = defined.get(match[1], "")
    first = _CONSTANT.search(start)
    return int(limits[0]) - int(first[1] if first else 0)


def traffic(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"} of one call}. What a loop repeats counts as often as it is repeated.

    Bytes are those of whole arrays on one device: what an all-gather gives, what an all-reduce or a reduce-scatter takes, what is
    sent between slices.
    """
    computations, entry = _computations(text)
    total = collections.defaultdict(lambda: {"count": 0, "bytes": 0})

    def visit(name: str, times: int, seen: set[str]) -> None:
        for line in computations[name]:
            if match := _LOOP.search(line):
                visit(match[3], times * _trips(line, computations[name], computations[match[2]]), set())
            elif match := _CALLED.search(line):
                for called in re.findall(r"%([\w.-]+)", match[1]):
                    visit(called, times, seen)
            if exchanged := _exchanged(line):
                kind, arrays = exchanged
                # An asynchronous collective is spread over several fusions, all with its channel.
                if channel := re.search(r"channel_id=\d+", line):
                    if channel[0] in seen:
                        continue
                    seen.add(channel[0])
                size = sum(_bytes(*array) for array in arrays)
                if kind == "reduce-scatter":
                    size *= _group_size(line)
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # as the TPU's compiler writes it
                total[kind]["count"] += times
                total[kind]["bytes"] += times * size

    visit(entry, 1, set())
    return dict(total)


def _bytes(dtype: str, dims: tuple[int, ...]) -> int:
    bits = _BITS.search(dtype)
    return math.prod(dims) * (int(bits[0]) // 8 if bits else 1)
