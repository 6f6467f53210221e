"""Weights in, by the command itself."""

import json

import jax
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works, checksums
from safetensors.numpy import save_file
from test_pytorch_parity import load, section

from speedit_jax.config import get_config
from speedit_jax.interop import dit
from speedit_jax.models.build import build
from speedit_jax.testing.vae_weights import write_vae

from .networks import HEADS, assert_computes, restored

MODELS = ["dit", "dig", "diffusers_dit"]


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_original_computes(imported, name):
    arrays, _, workdir = imported(name)
    assert_computes(workdir, arrays)
    assert_computes(workdir, arrays, "raw")


@pytest.mark.parametrize("name", MODELS)
def test_it_samples_without_more_flags(run, imported, tmp_path, name):
    _, _, workdir = imported(name)
    result = run("sample", f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--num_images=2", "--num_steps=2")
    assert_works(result)
    settings = json.loads((tmp_path / "x.json").read_text())
    side = 12 if name == "dig" else 8
    assert np.load(tmp_path / "x.npz")["latents"].shape == (2, side, side, 4)
    assert settings["clip"] is False
    assert settings["guidance_channels"] == (0 if name == "diffusers_dit" else 3)


def test_the_config_is_the_models(imported):
    _, _, meta = restored(imported("dit")[2])
    config = meta["config"]
    assert config["model"]["name"] == "DiT-tiny/2" and config["model"]["time_freq_shift"] == 0
    assert (config["model"]["width"], config["model"]["depth"], config["model"]["heads"]) == (32, 2, 4)
    assert config["diffusion"]["variance"] == "learned_range"
    assert meta["image_shape"] == [8, 8, 4] and meta["class_names"] == [str(i) for i in range(10)]
    _, _, meta = restored(imported("dig")[2])
    assert meta["config"]["model"]["heads"] == 2 and meta["config"]["model"]["name"] == "DiG-tiny/2"
    _, _, meta = restored(imported("diffusers_dit")[2])
    assert meta["config"]["model"]["time_freq_shift"] == 1 and len(meta["class_names"]) == 1000


def test_training_there_is_one_clear_line(run, imported):
    _, source, workdir = imported("dit")
    before = checksums(workdir)
    assert_fails(run("train", *TINY, f"--workdir={workdir}"), str(workdir), f"imported from {source}", "--workdir")
    other = [f"--from={source}", f"--workdir={workdir}", HEADS, "--config.model.label_dropout=0"]
    assert_fails(run("convert", *other), "imported", "--workdir")
    assert checksums(workdir) == before


def changed(name, change):
    def change_state(state):
        if change is None:
            del state[name]
        else:
            state[name] = change(state.get(name))

    return change_state


BAD_TENSORS = {
    "missing": (changed("blocks.1.mlp.fc2.bias", None), [HEADS], ["missing blocks.1.mlp.fc2.bias"]),
    "extra": (changed("blocks.1.ls1.gamma", lambda _: np.ones(32, np.float32)), [HEADS], ["extra blocks.1.ls1.gamma"]),
    "misshapen": (
        changed("t_embedder.mlp.0.weight", lambda a: a[:, :128].copy()),
        [HEADS],
        ["t_embedder.mlp.0.weight has shape (32, 128), not (32, 256)"],
    ),
    "nothing": (lambda state: state.clear(), [], ["missing x_embedder.proj.weight"]),
    "learned positions": (changed("pos_embed", lambda a: a[:, ::-1].copy()), [HEADS], ["pos_embed", "4 x 4 grid"]),
    "positions of no square": (changed("pos_embed", lambda a: a[:, :8].copy()), [HEADS], ["8 positions", "--config.data.height"]),
    "heads": (lambda state: None, [], ["--config.model.heads"]),
    "heads that do not divide": (lambda state: None, ["--config.model.heads=5"], ["width 32 with 5 heads"]),
    "another size": (lambda state: None, [HEADS, "--config.data.height=16"], ["16 positions", "16 x 8"]),
    "typo": (lambda state: None, ["--config.model.haeds=4"], ["haeds", 'Did you mean "heads"']),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(run, tmp_path, case):
    change, flags, words = BAD_TENSORS[case]
    state = section(load("dit"), "state/")
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    result = run("convert", f"--from={tmp_path / 'x.safetensors'}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_fails(result, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_with_its_autoencoder_it_draws_pictures(run, tmp_path):
    vae = write_vae(tmp_path / "vae", "small")
    config = get_config("DiT-tiny/2").model
    model = build(config, image_shape=(8, 8, 16), num_classes=10, learned_variance=True, platform="cpu")
    shapes = dit.TABLE.shapes(jax.eval_shape(model.init, jax.random.key(0)), 2)
    save_file({name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    size = ["--config.data.height=8", "--config.data.width=8"]
    flags = [f"--from={tmp_path / 'x.safetensors'}", f"--workdir={tmp_path / 'run'}", *size]
    result = run("convert", *flags, f"--config.data.vae={vae}")
    assert_works(result)
    assert "latents" not in result.out
    sample = ["sample", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'new'}", "--num_images=2", "--num_steps=2"]
    assert_works(run(*sample))
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_another_autoencoder_is_refused(run, imported, tmp_path):
    vae = write_vae(tmp_path / "vae", "small")
    flags = [f"--from={imported('dig')[1]}", f"--workdir={tmp_path / 'run'}"]
    assert_fails(run("convert", *flags, f"--config.data.vae={vae}"), "latents of 16 channels", "the network has 4")
    assert_fails(run("convert", *flags, "--config.data.vae=/no/such"), "/no/such")
    assert not (tmp_path / "run").exists()
