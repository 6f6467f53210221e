"""PixArt's weights in and out, by the command itself."""

import json

import jax
import numpy as np
import pytest
from commands import assert_fails, assert_works
from safetensors.numpy import load_file, save_file
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.models.condition import padded
from speedit_jax.models.layers import sincos_position_table
from speedit_jax.training.run import open_run

from .networks import assert_same_tensors

# Of two heads, and of the 8 x 8 latents whose positions are halved: the published tensors do not tell.
TOLD = ["--config.model.heads=2", "--config.model.position_scale=2", "--config.data.height=8", "--config.data.width=8"]


@pytest.fixture(scope="module")
def arrays():
    return load("pixart")


@pytest.fixture(scope="module")
def published(arrays):
    """A file of the published names, whole."""
    positions = sincos_position_table(4, 4, 16, 2.0).astype(np.float32)[None]
    return {"pos_embed": positions, "y_embedder.y_embedding": np.ones((120, 12), np.float32), **section(arrays, "state/")}


@pytest.fixture(scope="module")
def imported(run, published, tmp_path_factory):
    root = tmp_path_factory.mktemp("pixart")
    save_file(published, root / "weights.safetensors")
    result = run("convert", f"--from={root / 'weights.safetensors'}", f"--workdir={root / 'run'}", *TOLD)
    assert_works(result)
    assert "text of 12 numbers a token" in result.out and '--prompt="TEXT" --text_encoder=WHERE' in result.out
    return root / "run"


def assert_computes(workdir, arrays):
    run = open_run(workdir)
    y = padded(arrays["text"], arrays["length"], run.model.text)
    out = jax.jit(run.model.apply)(run.restore(), nhwc(arrays["x"]), arrays["t"], y)
    assert_close(out, nhwc(arrays["out"]), 1e-5)


def test_published_names_in_and_out(run, arrays, published, imported, tmp_path):
    assert_computes(imported, arrays)
    config = open_run(imported).config
    assert (config.model.adaln, config.model.text, config.diffusion.variance) == ("single", "cross", "learned_range")
    assert (config.sampling.guidance_scale, config.sampling.guidance_channels) == (4.5, 0)
    out = tmp_path / "out.safetensors"
    assert_works(run("convert", f"--workdir={imported}", f"--to={out}"))
    assert_same_tensors(load_file(out), {name: published[name] for name in published if name != "y_embedder.y_embedding"})


def test_diffusers_in_and_out(run, arrays, imported, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    config = json.loads(str(arrays["config"]))
    (source / "config.json").write_text(json.dumps(config))
    save_file(section(arrays, "diffusers/"), source / "diffusion_pytorch_model.safetensors")
    assert_works(run("convert", f"--from={source}", f"--workdir={tmp_path / 'run'}"))
    assert_computes(tmp_path / "run", arrays)
    result = run("convert", f"--workdir={imported}", f"--to={out}/")
    assert_works(result)
    assert "only the transformer was written" in result.out
    assert_same_tensors(load_file(out / "diffusion_pytorch_model.safetensors"), section(arrays, "diffusers/"))
    ours = json.loads((out / "config.json").read_text())
    assert {key for key in ours if ours[key] != config[key]} == {"use_additional_conditions"}  # theirs leaves it open


def test_diffusers_reads_our_export(run, arrays, imported, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    assert_works(run("convert", f"--workdir={imported}", f"--to={tmp_path / 'out'}/"))
    network = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    x, text, t = (torch.as_tensor(arrays[name]) for name in ("x", "text", "t"))
    mask = (torch.arange(text.shape[1]) < torch.as_tensor(arrays["length"])[:, None]).float()
    with torch.no_grad():
        out = network(x, text, t, encoder_attention_mask=mask).sample
    np.testing.assert_allclose(out.numpy(), arrays["out"], atol=1e-5 * np.abs(arrays["out"]).max())


def test_what_is_refused(run, published, imported, tmp_path):
    for name, words in (("csize_embedder.mlp.0.weight", "1024 px PixArt-alpha"), ("blocks.0.attn.q_norm.weight", "PixArt-Sigma")):
        save_file(published | {name: np.ones((3, 3), np.float32)}, tmp_path / "other.safetensors")
        result = run("convert", f"--from={tmp_path / 'other.safetensors'}", f"--workdir={tmp_path / 'run'}", *TOLD)
        assert_fails(result, name, words)
    sample = ["sample", f"--workdir={imported}", "--prompt=a cat", f"--out={tmp_path / 'x'}"]
    assert_fails(run(*sample), "do not say where their text encoder is", "--text_encoder")
    assert_fails(run(*sample, "--text_encoder=words"), "tokens of 64 numbers", "want 12")
