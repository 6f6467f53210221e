"""Directories of weights as diffusers and transformers write them."""

import json

import numpy as np
import pytest
from errors import assert_one_line
from safetensors.numpy import save_file

from speedit_jax.interop import directories

STATE = {f"blocks.{i}.weight": np.full((4, 4), i, np.float32) for i in range(5)}


def write_shards(directory, index, names, suffix="safetensors"):
    """STATE in as many files as there are names."""
    items = list(STATE.items())
    where = {}
    for i, name in enumerate(names):
        part = dict(items[i :: len(names)])
        save_file(part, directory / name)
        where |= dict.fromkeys(part, name)
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def assert_read(found):
    assert found.keys() == STATE.keys()
    for name in STATE:
        np.testing.assert_array_equal(found[name], STATE[name])


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
)
def test_one_file(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert_read(directories.read(tmp_path))


@pytest.mark.parametrize(
    "index, shard",
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00003.safetensors"),
        ("model.safetensors.index.json", "model-0000{}-of-00003.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors"),
    ],
)
def test_shards(tmp_path, index, shard):
    names = [shard.format(i) for i in (1, 2, 3)]
    write_shards(tmp_path, index, names)
    assert_read(directories.read(tmp_path))
    assert_read(directories.read_file(tmp_path / index))
    (tmp_path / names[1]).unlink()
    assert_one_line(lambda: directories.read(tmp_path), names[1], index, "missing")
    save_file({"other": np.ones(1, np.float32)}, tmp_path / names[1])
    assert_one_line(lambda: directories.read(tmp_path), names[1], "lacks blocks.1.weight")
    (tmp_path / names[1]).write_bytes(b"<html>")
    assert_one_line(lambda: directories.read(tmp_path), names[1], "web page")


def test_full_precision_first_and_one_of_the_variants(tmp_path):
    half = {name: value.astype(np.float16) + 1 for name, value in STATE.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "diffusion_pytorch_model.fp16.bin").touch()
    assert directories.read(tmp_path)["blocks.0.weight"].dtype == np.float16
    save_file(half, tmp_path / "diffusion_pytorch_model.non_ema.safetensors")
    assert_one_line(lambda: directories.read(tmp_path), "fp16.safetensors and", "non_ema.safetensors", "give one")
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_read(directories.read(tmp_path))


def test_bin(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(value) for name, value in STATE.items()}, tmp_path / "diffusion_pytorch_model.bin")
    assert_read({name: value.numpy() for name, value in directories.read(tmp_path).items()})


def test_mistakes(tmp_path):
    assert_one_line(lambda: directories.read(tmp_path), "holds no diffusion_pytorch_model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_one_line(lambda: directories.read(tmp_path), "model.safetensors.index.json lists no weights")
    (tmp_path / "model.safetensors.index.json").write_text("[")
    assert_one_line(lambda: directories.read(tmp_path), "model.safetensors.index.json cannot be read")


def test_what_torch_libraries_shard(tmp_path):
    """Written by diffusers itself, of a few bytes a shard."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": 5}
    model = diffusers.DiTTransformer2DModel(**sizes, out_channels=8, norm_num_groups=1)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for i, options in enumerate(
        [{}, {"variant": "fp16"}, {"safe_serialization": False}, {"safe_serialization": False, "variant": "x"}]
    ):
        for size in ("10GB", "10KB"):
            directory = tmp_path / f"{i}{size}"
            model.save_pretrained(directory, max_shard_size=size, **options)
            assert (len(list(directory.iterdir())) > 2) == (size == "10KB")
            found = directories.read(directory)
            assert found.keys() == state.keys()
            for name in state:
                np.testing.assert_array_equal(np.asarray(found[name]), state[name])
