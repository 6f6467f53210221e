"""diffusers' directories in and out, by the command itself."""

import json

import jax
import numpy as np
import pytest
from commands import assert_fails, assert_works
from safetensors.numpy import load_file, save_file
from test_diffusers_parity import diffusers_state
from test_pytorch_parity import assert_close, load, nhwc, section

from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.models.vae import load_vae
from speedit_jax.testing.vae_weights import write_vae

from .networks import HEADS, assert_computes, assert_same_tensors, restored, write_diffusers


def test_diffusers_round_trip(run, imported, tmp_path):
    arrays, source, workdir = imported("diffusers_dit")
    out = tmp_path / "out"
    assert_works(run("convert", f"--workdir={workdir}", f"--to={out}/"))
    assert_same_tensors(load_file(out / "diffusion_pytorch_model.safetensors"), diffusers_state(arrays))
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (out, source))
    assert {key: theirs[key] for key in ours} == ours
    assert "Exact" in (out / "README.md").read_text()
    assert_fails(run("convert", f"--workdir={workdir}", f"--to={out}/"), "--to", "exists")


@pytest.fixture(scope="module")
def exported(run, imported, tmp_path_factory):
    """(autoencoder, pipeline) of the diffusers fixture's network."""
    root = tmp_path_factory.mktemp("pipeline")
    vae = write_vae(root / "vae", "four")
    result = run("convert", f"--workdir={imported('diffusers_dit')[2]}", f"--to={root / 'out'}/", f"--vae={vae}")
    assert_works(result)
    assert "Wrote a DiTPipeline" in result.out
    return vae, root / "out"


def test_a_pipeline_goes_out_and_in(run, imported, exported, tmp_path):
    vae, out = exported
    assert [path.read_bytes() for path in sorted((out / "vae").iterdir())] == [p.read_bytes() for p in sorted(vae.iterdir())]
    index = json.loads((out / "model_index.json").read_text())
    assert (index["_class_name"], index["id2label"]["7"], len(index["id2label"])) == ("DiTPipeline", "7", 1000)
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    np.testing.assert_array_equal(scheduler["trained_betas"], make_schedule("linear", 1000).betas)
    assert_works(run("convert", f"--from={out}", f"--workdir={tmp_path / 'run'}"))
    assert_computes(tmp_path / "run", imported("diffusers_dit")[0])


def test_a_pipeline_wants_its_autoencoder(run, imported, tmp_path):
    export = ["convert", f"--workdir={imported('diffusers_dit')[2]}", f"--to={tmp_path / 'out'}/"]
    assert_fails(run(*export, f"--vae={write_vae(tmp_path / 'vae', 'small')}"), "latents of 16 channels", "latents of 4")
    assert not (tmp_path / "out").exists()


def test_the_pipeline_draws_what_we_draw(imported, exported):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    vae, out = exported
    pipeline = diffusers.DiTPipeline.from_pretrained(out)
    labels, generator = np.array([3, 999]), torch.Generator().manual_seed(0)
    noise = nhwc(torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)).numpy())
    theirs = pipeline(labels.tolist(), guidance_scale=1, generator=generator, num_inference_steps=10, output_type="np").images
    model, params, _ = restored(imported("diffusers_dit")[2])
    diffusion = GaussianDiffusion(make_schedule("linear", 1000), "learned_range")

    def draw(noise):
        def denoise(x, t):
            return model.apply(params, x, t, labels)

        return sample(denoise, noise, diffusion, lambda k: 0 * noise, sampler="ddim", num_steps="ddim10")

    latents = jax.jit(draw)(noise)
    autoencoder, weights = load_vae(str(vae))
    ours = np.clip(jax.jit(autoencoder.decode)(weights, latents) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.1


def test_the_published_embedding_is_approximate_in_diffusers(run, imported, tmp_path):
    _, source, _ = imported("diffusers_dit")
    workdir, out = tmp_path / "run", tmp_path / "out"
    flags = ["--config.model.time_freq_shift=0"]
    assert_works(run("convert", f"--from={source}", f"--workdir={workdir}", *flags))
    result = run("convert", f"--workdir={workdir}", f"--to={out}")
    assert_works(result)
    for text in (result.out, (out / "README.md").read_text()):
        assert "Approximate" in text and "time_freq_shift 0" in text
        assert "% at t = 999" in text
    assert_same_tensors(*(load_file(path / "diffusion_pytorch_model.safetensors") for path in (source, out)))


def test_a_pipelines_directory_and_another_epsilon(run, tmp_path):
    arrays = load("diffusers_dit")
    (tmp_path / "pipeline").mkdir()
    write_diffusers(tmp_path / "pipeline" / "transformer", arrays, norm_eps=1e-5, _class_name="Transformer2DModel")
    result = run("convert", f"--from={tmp_path / 'pipeline'}", f"--workdir={tmp_path / 'run'}")
    assert_works(result)
    assert "note: approximate" in result.out and "1e-05" in result.out


@pytest.mark.parametrize("name, words", [("dig", ["DiG"])])
def test_diffusers_refuses(run, imported, tmp_path, name, words):
    result = run("convert", f"--workdir={imported(name)[2]}", f"--to={tmp_path / 'out'}/")
    assert_fails(result, "diffusers", *words)
    assert not any(tmp_path.iterdir())


def test_diffusers_refuses_other_shapes(run, tmp_path):
    """A wide, unconditional model without learned variance, imported and refused with all reasons."""
    state = section(load("dit"), "state/")
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"][:16]
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"][:16]
    del state["pos_embed"], state["y_embedder.embedding_table.weight"]
    save_file(state, tmp_path / "wide.safetensors")
    flags = [f"--from={tmp_path / 'wide.safetensors'}", f"--workdir={tmp_path / 'run'}", HEADS]
    assert_fails(run("convert", *flags), "pos_embed", "--config.data.height")
    assert_works(run("convert", *flags, "--config.data.height=4", "--config.data.width=8"))
    _, _, meta = restored(tmp_path / "run")
    assert meta["image_shape"] == [4, 8, 4] and meta["class_names"] == []
    assert meta["config"]["diffusion"]["variance"] == "fixed_large"
    result = run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}/")
    assert_fails(result, "no null label", "4 x 8, not square")
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out.safetensors'}"))
    back = load_file(tmp_path / "out.safetensors")
    assert back.pop("pos_embed").shape == (1, 8, 32)
    assert_same_tensors(back, state)


def test_what_it_predicts_is_not_lost_in_silence(run, imported, tmp_path):
    _, source, _ = imported("diffusers_dit")
    workdir, out = tmp_path / "run", tmp_path / "out"
    assert_works(run("convert", f"--from={source}", f"--workdir={workdir}", "--config.diffusion.prediction=v"))
    assert_fails(run("convert", f"--workdir={workdir}", f"--to={out}/"), "diffusers", "it predicts v, not epsilon")
    assert not out.exists()
    result = run("convert", f"--workdir={workdir}", f"--to={out}.safetensors")
    assert_works(result)
    assert "note: the model predicts v" in result.out


def test_unequal_embedders_are_refused(run, tmp_path):
    arrays = load("diffusers_dit")
    directory = write_diffusers(tmp_path / "source", arrays)
    state, name = diffusers_state(arrays), "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    save_file(state | {name: state[name] + 1}, directory / "diffusion_pytorch_model.safetensors")
    assert_fails(run("convert", f"--from={directory}", f"--workdir={tmp_path / 'run'}"), name)


def test_diffusers_computes_what_we_compute(run, imported, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    arrays, _, workdir = imported("diffusers_dit")
    assert_works(run("convert", f"--workdir={workdir}", f"--to={tmp_path / 'out'}/"))
    network, info = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    model, params, _ = restored(workdir)
    ours = jax.jit(model.apply)(params, nhwc(arrays["x"]), arrays["t"], arrays["y"])
    with torch.no_grad():
        x, t, y = (torch.from_numpy(arrays[name]) for name in ("x", "t", "y"))
        theirs = network.eval()(x, timestep=t, class_labels=y).sample
    assert_close(ours, nhwc(theirs.numpy()), 1e-5)
