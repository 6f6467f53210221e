"""Whatever a .pt holds beside tensors does nothing, and does not stand in their way."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import os
import pathlib
import types
import uuid

import numpy as np
import pytest
from errors import assert_one_line

from speedit_jax.interop import pickles

torch = pytest.importorskip("torch")


class Kind(enum.Enum):
    LINEAR = "linear"


class AttributeDict(dict):
    """As Lightning's and EasyDict's."""


class Names(list):
    pass


@dataclasses.dataclass
class Settings:
    width: int = 8


HARMLESS = {
    "NumPy number": np.float64(12.5),
    "NumPy bool": np.bool_(True),
    "NumPy dtype": np.dtype("float32"),
    "NumPy array": np.arange(3),
    "NumPy strings": np.array(["a"], dtype=object),
    "NumPy RNG, old": np.random.RandomState(0).get_state(),
    "NumPy RNG": np.random.default_rng(0),
    "torch RNG": torch.get_rng_state(),
    "torch size": torch.Size([1, 2]),
    "torch device": torch.device("cpu"),
    "torch dtype": torch.bfloat16,
    "torch function": torch.nn.functional.relu,
    "module": torch.nn.Linear(1, 1),
    "enum": Kind.LINEAR,
    "dict of another class": AttributeDict(lr=1.0),
    "list of another class": Names("ab"),
    "dataclass": Settings(),
    "Namespace": argparse.Namespace(lr=1.0),
    "SimpleNamespace": types.SimpleNamespace(lr=1.0),
    "OrderedDict": collections.OrderedDict(lr=1.0),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1]),
    "set": {1, 2},
    "frozenset of enums": frozenset([Kind.LINEAR]),
    "key that is an enum": {Kind.LINEAR: 1},
    "datetime": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(1),
    "path": pathlib.Path("x"),
    "uuid": uuid.UUID(int=1),
    "decimal": decimal.Decimal(1),
    "complex": 1j,
    "bytes": b"abc",
    "range": range(3),
    "slice": slice(1, 2),
    "type": int,
    "partial": functools.partial(max, 1),
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("protocol, zipped", [(2, True), (4, True), (2, False)])
def test_the_tensors_beside_it_are_read(tmp_path, kind, protocol, zipped):
    if kind == "module" and not zipped:
        pytest.skip("old files have the module's source, too")
    tensors = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.nn.Parameter(torch.zeros(1))}
    path = tmp_path / "x.pt"
    # The other one first and last: what it leaves on the unpickler's stack would be seen.
    content = {"first": HARMLESS[kind], **tensors, "last": [HARMLESS[kind]]}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = pickles.read(path)
    assert found.keys() == content.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_what_was_saved_is_seen(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1.0), "hparams": AttributeDict(width=8)}, tmp_path / "x.pt")
    found = pickles.read(tmp_path / "x.pt")
    assert found["args"].saved == {"lr": 1.0} and found["args"].kind == "argparse.Namespace"
    assert dict(found["hparams"]) == {"width": 8}


class Runs:
    """Rebuilt by calling a function."""

    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


def attacks(target):
    """Pickles that would make the file `target`, each in another way."""
    code = f"open({str(target)!r}, 'w')"
    return {
        "os.system": Runs(os.system, f"touch {target}"),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "open": Runs(open, str(target), "w"),
        "import": Runs(__import__, "os"),
        "getattr of a module": Runs(getattr, Runs(__import__, "os"), "system"),
        "pathlib": Runs(pathlib.Path.touch, pathlib.Path(target)),
        "partial": Runs(functools.reduce, os.mkdir, [str(target)]),
        "numpy": Runs(np.save, str(target), np.zeros(1)),
        "torch": Runs(torch.save, 1, str(target)),
        "storage": Runs(torch.storage._load_from_bytes, b"x"),
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run(tmp_path, name, zipped):
    """By refusal, or because the function that is named is none of ours."""
    target = tmp_path / "made"
    torch.save({"a": torch.ones(1), "b": attacks(target)[name]}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    try:
        found = pickles.read(tmp_path / "x.pt")
        assert isinstance(found["b"], pickles.Inert)
    except Exception as e:
        assert "only tensors" in str(e) or "read safely" in str(e), e
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_an_attack_is_named(tmp_path):
    torch.save({"a": Runs(os.system, "true")}, tmp_path / "x.pt")
    assert_one_line(lambda: pickles.read(tmp_path / "x.pt"), f"{os.name}.system", "only tensors")


def test_what_rebuilds_tensors_cannot_be_changed(tmp_path):
    """BUILD sets attributes of what is on the stack: of the function that rebuilds tensors, here."""

    class Changes:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (), (None, {"__defaults__": (1, 2, 3)})

    before = torch._utils._rebuild_tensor_v2.__defaults__
    torch.save({"a": Changes()}, tmp_path / "x.pt")
    assert_one_line(lambda: pickles.read(tmp_path / "x.pt"), "read safely")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
