"""What each kernel of a compiled module reads, writes and computes, by the rules of its instructions.

A fusion reads an operand once however often it uses it, of an operand that it only slices the slices, and writes of an array that
it updates in place the update. Loops are multiplied out.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

from benchmarks.gpu.hlo import Instruction, Module

FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "partition-id", "replica-id", "after-all"}
# What only moves data; a kernel of nothing else computes nothing.
MOVES = FREE | {"copy", "dynamic-slice", "dynamic-update-slice", "slice", "transpose", "reshape", "concatenate", "pad"}
MOVES |= {"broadcast", "convert", "reverse", "iota", "fusion"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "erf", "rsqrt", "sqrt", "tanh"}
_TRANSCENDENTAL |= {"sine", "cosine", "power", "divide"}


@dataclasses.dataclass
class Work:
    """Operations by the unit that does them."""

    products: int = 0  # FLOPs of matrix products
    vector: int = 0
    transcendental: int = 0  # exp, division and the like

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, n: int) -> "Work":
        return Work(*(n * a for a in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, `calls` times a step.

    Attributes:
      origins: op_name -> bytes of what its instructions make, of all that compute something.
      reads, writes: bytes a call.
      stacked: bytes a call, of both, that are rows of a larger array: what a loop over layers hands on.
      target: the kernel's name, of one written by hand, or the library's.
      dtypes: of the arrays that it writes.
    """

    name: str
    calls: int
    reads: int
    writes: int
    stacked: int
    work: Work
    origins: dict[str, int]
    opcodes: frozenset[str]
    target: str | None
    dtypes: tuple[str, ...]


class Reader:
    """Of a module; `handwritten` is the work of the kernels that XLA does not see into, by their names."""

    def __init__(self, module: Module, handwritten: dict[str, Work]):
        self._module, self._handwritten = module, handwritten

    def kernels(self, computation: str, calls: int = 1) -> Iterator[Kernel]:
        """All that a computation launches, and what its loops, calls and branches launch."""
        for instruction in self._module[computation].values():
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith("-done"):
                continue
            if opcode == "while":
                trips = int(instruction.attribute(r'"known_trip_count":{"n":"(\d+)"') or 1)
                for part, times in (("body", trips), ("condition", trips + 1)):
                    yield from self.kernels(instruction.attribute(rf"{part}=%([\w.\-]+)"), calls * times)
            elif opcode in ("call", "conditional", "async-start"):
                names = re.findall(r"(?:to_apply|calls|computation|branch_computations)=\{?%([\w.\-]+)", instruction.attributes)
                for name in names[:1]:
                    yield from self.kernels(name, calls)
            else:
                yield self._kernel(computation, instruction, calls)

    def _kernel(self, computation: str, instruction: Instruction, calls: int) -> Kernel:
        around = self._module[computation]
        inner = self._module.get(instruction.attribute(r"calls=%([\w.\-]+)") or "")
        target = None
        if instruction.opcode == "custom-call":
            target = instruction.attribute(r'\bname = "(\w+)"') or instruction.attribute(r'custom_call_target="([^"]+)"')
        if inner and instruction.opcode.startswith("fusion"):
            reads, writes, stacked = self._traffic(inner)
            work, origins, opcodes = self._inside(inner)
            results = next(i for i in inner.values() if i.root).arrays
        else:
            reads = sum(around[name].bytes for name in instruction.operands)
            writes, stacked = instruction.bytes, 0
            work, origins = self._work(around, instruction), {instruction.op_name: instruction.bytes}
            opcodes, results = frozenset({instruction.opcode}), instruction.arrays
        if not origins:
            origins = {instruction.op_name: instruction.bytes}
        work = self._handwritten.get(target or "", work)
        dtypes = tuple(sorted({array.dtype for array in results}))
        return Kernel(instruction.name, calls, reads, writes, stacked, work, origins, opcodes, target, dtypes)

    def _traffic(self, inner: dict[str, Instruction]) -> tuple[int, int, int]:
        users: dict[str, list[Instruction]] = {}
        for instruction in inner.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)

        def read(name: str) -> tuple[int, bool]:
            """Bytes read of it, and whether these are only slices."""
            total, sliced = 0, True
            for user in users.get(name, ()):
                if user.opcode in _SLICES and user.operands[0] == name:
                    total += user.bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    pass
                elif user.opcode == "bitcast":
                    more, still = read(user.name)
                    total, sliced = total + more, sliced and still
                else:
                    total, sliced = total + inner[name].bytes, False
            return min(total, inner[name].bytes), sliced

        reads = stacked = 0
        for instruction in inner.values():
            if instruction.opcode == "parameter":
                size, sliced = read(instruction.name)
                reads += size
                stacked += size if sliced and size < instruction.bytes and self._dynamic(instruction, users) else 0
        writes = 0
        root = next(i for i in inner.values() if i.root)
        for name in root.operands if root.opcode == "tuple" else (root.name,):
            made = inner[name]
            while made.opcode == "bitcast":
                made = inner[made.operands[0]]
            if made.opcode == "dynamic-update-slice":
                writes += inner[made.operands[1]].bytes
                stacked += inner[made.operands[1]].bytes
            else:
                writes += made.bytes
        return reads, writes, stacked

    def _dynamic(self, instruction: Instruction, users: dict[str, list[Instruction]]) -> bool:
        """Whether it is sliced at a place that the loop's counter gives."""
        found = users.get(instruction.name, ())
        return any(u.opcode == "dynamic-slice" or (u.opcode == "bitcast" and self._dynamic(u, users)) for u in found)

    def _inside(self, inner: dict[str, Instruction]) -> tuple[Work, dict[str, int], frozenset[str]]:
        work, origins, opcodes = Work(), {}, set()
        for instruction in inner.values():
            nested = self._module.get(instruction.attribute(r"calls=%([\w.\-]+)") or "")
            if instruction.opcode == "fusion" and nested:
                more, found, kinds = self._inside(nested)
                work, opcodes = work + more, opcodes | kinds
                for name, size in found.items():
                    origins[name] = origins.get(name, 0) + size
                continue
            work += self._work(inner, instruction)
            if any(array.size > 1 for array in instruction.arrays):  # not the arithmetic of a loop's counter
                opcodes.add(instruction.opcode)
            if instruction.opcode not in MOVES and instruction.op_name:
                origins[instruction.op_name] = origins.get(instruction.op_name, 0) + instruction.bytes
        return work, origins, frozenset(opcodes)

    def _work(self, around: dict[str, Instruction], instruction: Instruction) -> Work:
        opcode, size = instruction.opcode, sum(array.size for array in instruction.arrays[:1])
        if opcode == "dot":
            contracted = (around[instruction.operands[0]].arrays[0].dims[d] for d in instruction.dims("lhs_contracting_dims"))
            return Work(products=2 * size * math.prod(contracted))
        if opcode == "custom-call" and "__cublas" in instruction.attributes:
            return Work(products=2 * size * self._contracted(around, instruction))
        if opcode == "custom-call" and "__cudnn$fmha" in instruction.attributes:
            # q [B, T, H, K] comes first: two products forward, five backward, over T keys.
            q = around[instruction.operands[0]].arrays[0]
            return Work(products=(10 if "Backward" in instruction.attributes else 4) * q.size * q.dims[1])
        if opcode == "convolution":
            kernel = around[instruction.operands[1]].arrays[0]
            return Work(products=2 * size * kernel.size // max(kernel.dims))
        if opcode in _TRANSCENDENTAL:
            return Work(transcendental=size)
        if opcode == "reduce":
            return Work(vector=around[instruction.operands[0]].arrays[0].size)
        return Work() if opcode in MOVES | {"custom-call"} else Work(vector=size)

    @staticmethod
    def _contracted(around: dict[str, Instruction], instruction: Instruction) -> int:
        backend = json.loads(instruction.attribute(r"backend_config=(\{.*\})") or "{}")
        numbers = backend.get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
        dims = around[instruction.operands[0]].arrays[0].dims
        return math.prod(dims[int(d)] for d in numbers.get("lhs_contracting_dimensions", ()))


def handwritten(jaxpr) -> dict[str, Work]:
    """The work of one call of each Pallas kernel in a program's jaxpr, over its whole grid, by the kernel's name."""
    found: dict[str, Work] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            programs = math.prod(eqn.params["grid_mapping"].grid)
            name = eqn.params["name"] or eqn.params["jaxpr"].debug_info.func_name
            found[name] = _of_jaxpr(eqn.params["jaxpr"]) * programs
        else:
            for inner in _inner(eqn):
                found |= handwritten(inner)
    return found


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


_JAX_TRANSCENDENTAL = {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "tanh", "logistic", "div"}
_JAX_FREE = {"broadcast_in_dim", "iota", "convert_element_type", "transpose", "reshape", "squeeze", "get", "swap", "slice"}


def _of_jaxpr(jaxpr) -> Work:
    work = Work()
    for eqn in jaxpr.eqns:
        kind, size = eqn.primitive.name, sum(math.prod(v.aval.shape) for v in eqn.outvars[:1] if hasattr(v.aval, "shape"))
        inner = list(_inner(eqn))
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            work += Work(products=2 * size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted))
        elif kind == "cond":
            work += min(map(_of_jaxpr, inner), key=lambda branch: branch.products)  # GLA's gates are bounded, as DiG's are
        elif inner:
            times = eqn.params.get("length", 1)
            work += functools.reduce(Work.__add__, map(_of_jaxpr, inner)) * times
        elif kind in _JAX_TRANSCENDENTAL:
            work += Work(transcendental=size)
        elif kind.startswith("reduce"):
            work += Work(vector=math.prod(eqn.invars[0].aval.shape))
        elif kind not in _JAX_FREE:
            work += Work(vector=size)
    return work
