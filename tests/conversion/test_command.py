"""The flags of convert."""

import importlib.util
import shutil

import pytest
from commands import assert_fails
from test_pytorch_parity import FIXTURES

from .networks import HEADS


def test_mistakes_are_one_line(run, imported, tmp_path):
    _, source, workdir = imported("dit")
    (tmp_path / "x.safetensors").write_text("text")
    (tmp_path / "empty").mkdir()
    new = f"--workdir={tmp_path / 'run'}"
    for flags, words in (
        ([], ["--workdir"]),
        ([new], ["--from", "--to"]),
        ([new, f"--from={source}", "--to=x.pt"], ["--from", "--to"]),
        ([new, "--from=/no/such.safetensors"], ["/no/such.safetensors"]),
        ([new, "--from=facebook/DiT-XL-2-256"], ["no such file", "--from=hf:facebook/DiT-XL-2-256"]),
        ([new, f"--from={source}", HEADS, "--reverse_time"], ["--reverse_time", "--config.diffusion.path=linear"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--reverse_time"], ["--reverse_time is only for --from"]),
        ([new, f"--from={source}", "--vae=x"], ["--vae", "--config.data.vae=DIR"]),
        ([new, f"--from={source}", HEADS, "--weights=raw"], ["--weights=raw is only for --to"]),
        ([new, f"--from={source}", HEADS, "--checkpoint_step=5"], ["--checkpoint_step=5 is only for --to"]),
        ([new, f"--from={source}", HEADS, "--config.sampling.guidance_scale=nan"], ["sampling.guidance_scale=nan", "finite"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--vae=x"], ["--vae is only for diffusers directories"]),
        ([new, f"--from={tmp_path / 'x.safetensors'}"], ["x.safetensors", "no file of weights"]),
        ([new, f"--from={tmp_path / 'empty'}"], ["empty", "diffusion_pytorch_model.safetensors"]),
        ([new, f"--to={tmp_path / 'y.safetensors'}"], ["no checkpoints"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.onnx'}"], ["y.onnx", ".safetensors"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--config.seed=1"], ["--config.seed"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--checkpoint_step=5"], ["step 5"]),
        ([new, "--from=hf:owner"], ["--from=hf:owner", "hf:OWNER/NAME@REVISION"]),
        ([new, f"--from={source}", "--license=mit"], ["--license", "--to=hf:OWNER/NAME"]),
        ([f"--workdir={workdir}", "--to=hf:owner/name@v1", "--license=mit"], ["--to=hf:owner/name@v1", "main branch"]),
        ([f"--workdir={workdir}", "--to=hf:name", "--license=mit"], ["--to=hf:name", "hf:OWNER/NAME"]),
        ([f"--workdir={workdir}", "--to=hf:owner/name"], ["--license is missing", "apache-2.0", "other"]),
        ([f"--workdir={workdir}", "--to=hf:owner/name", "--vae=x"], ["--vae", "diffusers"]),
        ([f"--workdir={workdir}", "--to=y.pt", "--public"], ["--public", "--to=hf:OWNER/NAME"]),
        ([f"--workdir={workdir}", "--to=/dev/null/y.safetensors"], ["/dev/null/y.safetensors"]),
    ):
        assert_fails(run("convert", *flags), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x.safetensors"]


def test_without_torch_a_pt_is_one_line(run, imported, tmp_path):
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed")
    shutil.copy(FIXTURES / "dit_checkpoint.pt", tmp_path / "x.pt")
    for flags in ([f"--from={tmp_path / 'x.pt'}", f"--workdir={tmp_path / 'run'}"], [f"--to={tmp_path / 'y.pt'}"]):
        assert_fails(run("convert", f"--workdir={imported('dit')[2]}", *flags), "PyTorch", "pip install torch")


def test_help(run):
    result = run("convert", "--help")
    assert "--from" in result.out and "--to" in result.out and "python -m speedit_jax.convert" in result.out
    assert not result.err
