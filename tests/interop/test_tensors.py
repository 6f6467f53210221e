"""Files of tensors, by what they are."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
from errors import assert_one_line
from safetensors.numpy import save_file

from speedit_jax.interop import tensors

VALUES = np.array([[0.5, -1.5, 448.0], [2.0, 0.0, -0.0625]], np.float32)  # which all float8 of the field hold

BAD = {
    "empty": (b"", ["empty"]),
    "zeros, of a download that reserved its space": (b"\0" * 600, ["empty"]),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["Git LFS", "git lfs pull"]),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", ["web page"]),
    "text": (b"weights", ["no file of weights", ".safetensors", ".pt"]),
    "JSON": (b'{"a": 1}', ["no file of weights"]),
    "cut zip": (b"PK\x03\x04" + b"x" * 100, ["cut short"]),
    "cut safetensors": ((50).to_bytes(8, "little") + b'{"a":', [".safetensors", "download"]),
    "GGUF": (b"GGUF" + b"\1" * 100, ["no file of weights"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.ckpt"])
def test_other_files_are_one_line(tmp_path, case, name):
    content, words = BAD[case]
    (tmp_path / name).write_bytes(content)
    assert_one_line(lambda: tensors.read(tmp_path / name), *words)


def test_a_zip_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("DiT/model.safetensors", b"")
    assert_one_line(lambda: tensors.read(tmp_path / "x.pt"), "zip archive of DiT/model.safetensors", "unpack")


def test_the_name_does_not_matter(tmp_path):
    save_file({"a": VALUES}, tmp_path / "x.pt")
    np.savez(tmp_path / "y.npz", a=VALUES)
    (tmp_path / "y.npz").rename(tmp_path / "y.safetensors")
    for name in ("x.pt", "y.safetensors"):
        np.testing.assert_array_equal(tensors.read(tmp_path / name)["a"], VALUES)


def write_safetensors(path, dtype, array):
    """The format by its definition: the length of the header, the header, the bytes."""
    data = array.tobytes()
    header = f'{{"a":{{"dtype":"{dtype}","shape":{list(array.shape)},"data_offsets":[0,{len(data)}]}}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "dtype, kind",
    {
        "F64": np.float64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items(),
)
def test_dtypes_are_widened(tmp_path, dtype, kind):
    write_safetensors(tmp_path / "x.safetensors", dtype, VALUES.astype(kind))
    found = tensors.arrays(tensors.read(tmp_path / "x.safetensors"))["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VALUES.astype(kind).astype(np.float32))


def test_another_dtype_is_one_line(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", "F8_E8M0", np.zeros(4, np.uint8))
    assert_one_line(lambda: tensors.read(tmp_path / "x.safetensors"), "a has dtype F8_E8M0", "F8_E4M3")


def test_torchs_float8_is_read_as_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"):
        tensor = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
        save_torch({"a": tensor}, tmp_path / f"{name}.safetensors")
        torch.save({"a": tensor}, tmp_path / f"{name}.pt")
        for suffix in ("safetensors", "pt"):
            found = tensors.arrays(tensors.read(tmp_path / f"{name}.{suffix}"))["a"]
            np.testing.assert_array_equal(found, tensor.float().numpy(), err_msg=f"{name} {suffix}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_named(value, kind):
    state = {"a": VALUES, "b.c": VALUES.astype(kind)}
    state["b.c"][1, 2] = value
    assert_one_line(lambda: tensors.arrays(state), "b.c is not finite: 1 of its 6 numbers")


def test_what_overflows_in_half_precision_is_named():
    with np.errstate(over="ignore"):
        assert_one_line(lambda: tensors.arrays({"a": np.array([1e6]).astype(np.float16)}), "a is not finite", "half precision")
        assert_one_line(lambda: tensors.arrays({"a": np.array([1e300])}), "a is not finite")


def test_a_whole_module_or_program_is_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert_one_line(lambda: tensors.read(tmp_path / "module.pt"), "whole torch.nn.modules.linear.Linear", "state_dict()")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    assert_one_line(lambda: tensors.read(tmp_path / "program.pt"), "TorchScript", "state_dict")
