"""What the tables share: PyTorch's array layouts, layers stacked along our scan over depth, errors that name tensors.

linear       [out, in]        ours [in, out], either possibly split: heads, the three of qkv and the chunks of adaLN are
                              row-major in both, so that a reshape splits them
convolution  [D, C, P, P]     ours [P, P, C, D]: as [P*P*C, D] where it embeds patches, [3, 3, D] where it is depthwise
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from speedit_jax.errors import UserError

PARAMETERS = {"kernel": "weight", "bias": "bias", "table": "weight", "weight": "weight"}
COMPUTED = "pos_embed"  # stored by PyTorch, computed by us

# (our module in a block, our parameter's name, the layer's position in the period, array in our layout) -> the array, turned
Rearrange = Callable[[str, str, int, np.ndarray], np.ndarray]


def check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a UserError that names the tensors by which two sets of shapes differ."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"extra {name}" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {tuple(found[name])}, not {tuple(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"the tensors do not fit the model: {'; '.join(problems[:5])}{more}")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a state_dict.

    Attributes:
      name, shape: PyTorch's.
      row: which row of our leaf it is, where our scan stacks layers; None where the leaf is the tensor.
      position: of its layer in the period.
      module, parameter: ours; in a block where it belongs to one.
      ours: its shape in our tree, without the stacked axis.
    """

    name: str
    shape: tuple[int, ...]
    row: int | None
    position: int
    module: str
    parameter: str
    ours: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Where each tensor of a state_dict lives in our parameter tree.

    Attributes:
      modules: our module around the blocks -> the PyTorch module; our parameter without a module -> the PyTorch parameter.
      block_modules: the same in a block -> in "blocks.N".
      rearrange: what their layers and ours see differently; its own inverse.
    """

    modules: Mapping[str, str]
    block_modules: Mapping[str, str]
    rearrange: Rearrange = lambda module, parameter, position, value: value

    def shapes(self, like: Any, patch: int) -> dict[str, tuple[int, ...]]:
        """PyTorch name -> shape of every tensor but the position table.

        Args:
          like: our parameter tree, arrays or shapes.
          patch: P.
        """
        return {tensor.name: tensor.shape for leaf in self._tensors(like, patch).values() for tensor in leaf}

    def from_torch(self, state: Mapping[str, np.ndarray], like: Any, patch: int) -> Any:
        """Arranges tensors, or their gradients, as our parameters.

        Args:
          state: PyTorch name -> array.
          like, patch: as for `shapes`.

        Raises:
          UserError: a tensor is missing, extra or of another shape.
        """
        check({name: np.shape(value) for name, value in state.items() if name != COMPUTED}, self.shapes(like, patch))
        tensors = self._tensors(like, patch)

        def leaf(path, target):
            del target
            values = [self._to_ours(tensor, np.asarray(state[tensor.name])) for tensor in tensors[_keys(path)]]
            return values[0] if tensors[_keys(path)][0].row is None else np.stack(values)

        return jax.tree_util.tree_map_with_path(leaf, like)

    def to_torch(self, params: Any, patch: int) -> dict[str, np.ndarray]:
        """The inverse of `from_torch`, without the position table."""
        leaves = {_keys(path): np.asarray(value) for path, value in jax.tree_util.tree_flatten_with_path(params)[0]}
        return {
            tensor.name: self._to_theirs(tensor, leaves[path] if tensor.row is None else leaves[path][tensor.row])
            for path, tensors in self._tensors(params, patch).items()
            for tensor in tensors
        }

    def _tensors(self, like: Any, patch: int) -> dict[tuple[str, ...], list[Tensor]]:
        leaves = {_keys(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
        # blocks/block_j holds layers j, j + period, ...; rest_j is the j-th layer after the last whole period.
        period = len({path[1] for path in leaves if path[0] == "blocks" and path[1].startswith("block_")}) or 1
        repeats = next((shape[0] for path, shape in leaves.items() if path[0] == "blocks"), 0)

        def of_leaf(path, shape):
            block, module, parameter = _split(path)
            if block is None:
                name = _named(self.modules, module, parameter)
                yield Tensor(name, _torch_shape(module, parameter, shape, patch), None, 0, module, parameter, shape)
                return
            position = int(block.rpartition("_")[2]) if "_" in block else 0
            rows, ours = (range(repeats), shape[1:]) if path[0] == "blocks" else ([None], shape)
            for row in rows:
                layer = (repeats if row is None else row) * period + position
                name = f"blocks.{layer}.{_named(self.block_modules, module, parameter)}"
                yield Tensor(name, _torch_shape(module, parameter, ours, patch), row, position, module, parameter, ours)

        return {path: list(of_leaf(path, shape)) for path, shape in leaves.items()}

    def _to_ours(self, tensor: Tensor, value: np.ndarray) -> np.ndarray:
        if tensor.parameter == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        return self.rearrange(tensor.module, tensor.parameter, tensor.position, value.reshape(tensor.ours))

    def _to_theirs(self, tensor: Tensor, value: np.ndarray) -> np.ndarray:
        value = self.rearrange(tensor.module, tensor.parameter, tensor.position, value)
        if tensor.parameter != "kernel":
            return value.reshape(tensor.shape)
        if len(tensor.shape) == 2:
            return value.reshape(tensor.shape[::-1]).T
        out, channels, rows, columns = tensor.shape
        return value.reshape(rows, columns, channels, out).transpose(3, 2, 0, 1)


def _keys(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _split(path: tuple[str, ...]) -> tuple[str | None, str, str]:
    """(our block or None around the blocks, our module in it, our parameter)."""
    *modules, parameter = path
    if modules[:1] == ["blocks"] and path[1].startswith("block_"):
        return modules[1], "/".join(modules[2:]), parameter
    if modules and (modules[0] == "blocks" or modules[0].startswith("rest_")):
        return modules[0], "/".join(modules[1:]), parameter
    return None, "/".join(modules), parameter


def _named(modules: Mapping[str, str], module: str, parameter: str) -> str:
    return f"{modules[module]}.{PARAMETERS[parameter]}" if module else modules[parameter]


def _torch_shape(module: str, parameter: str, shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    if parameter == "bias":
        return (math.prod(shape),)
    if parameter != "kernel":
        return shape
    if module == "patch":
        return (shape[1], shape[0] // patch**2, patch, patch)
    if module == "conv":
        return (shape[2], 1, *shape[:2])
    inputs = 2 if module in ("attention/out", "cross/out") else 1  # heads and their width
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
