"""Weights in and out by the command itself: the fixtures' networks, recorded from the published codes and from diffusers."""

import argparse
import importlib.util
import json
import os
import sys
import types

import jax
import ml_collections
import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works, checksums
from safetensors.numpy import load_file, save_file
from test_diffusers_parity import diffusers_state
from test_pytorch_parity import FIXTURES, assert_close, load, nhwc, section

from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.samplers import sample
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.interop import dit
from speedit_jax.models.build import build
from speedit_jax.models.vae import load_vae
from speedit_jax.testing.vae_weights import write_vae
from speedit_jax.training.checkpoint import Checkpoints

HEADS = "--config.model.heads=4"  # DiT's tensors do not tell


def restored(workdir, weights="ema"):
    """(model, parameters, meta) of what was imported."""
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(checkpoints.latest())
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    config = ml_collections.ConfigDict(meta["config"])
    model = build(
        config.model,
        image_shape=tuple(meta["image_shape"]),
        num_classes=len(meta["class_names"]),
        learned_variance=config.diffusion.variance == "learned_range",
        platform="cpu",
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(mesh, model.axes, shapes)
    return model, checkpoints.restore_weights(checkpoints.latest(), weights, shapes, shardings), meta


def assert_computes(workdir, arrays, weights="ema"):
    model, params, _ = restored(workdir, weights)
    out = jax.jit(model.apply)(params, nhwc(arrays["x"]), arrays["t"], arrays["y"])
    assert_close(out, nhwc(arrays["out"]), 1e-5)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def write_diffusers(directory, arrays, **changes):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(json.loads(str(arrays["config"])) | changes))
    save_file(diffusers_state(arrays), directory / "diffusion_pytorch_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def imported(run, tmp_path_factory):
    """(the fixture's arrays, the file, the directory it was imported to) of "dit", "dig" or "diffusers_dit"."""
    done = {}

    def imported(name):
        if name not in done:
            root, arrays = tmp_path_factory.mktemp(name), load(name)
            if name == "diffusers_dit":
                source = write_diffusers(root / "source", arrays)
            else:
                source = root / "weights.safetensors"
                save_file(section(arrays, "state/"), source)
            result = run("convert", f"--from={source}", f"--workdir={root / 'run'}", *([HEADS] if name == "dit" else []))
            assert_works(result)
            assert f"python -m speedit_jax.sample --workdir={root / 'run'}" in result.out and "note:" not in result.out
            done[name] = arrays, source, root / "run"
        return done[name]

    return imported


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
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, side, side, 4)
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
    assert_fails(run("convert", f"--from={source}", f"--workdir={workdir}", HEADS), "imported", "--workdir")
    assert checksums(workdir) == before


@pytest.mark.parametrize("name", ["dit", "dig"])
def test_a_round_trip_is_exact(run, imported, tmp_path, name):
    arrays, _, workdir = imported(name)
    out = tmp_path / "new" / "out.safetensors"
    result = run("convert", f"--workdir={workdir}", f"--to={out}")
    assert_works(result)
    assert "note" not in result.out
    state, back = section(arrays, "state/"), load_file(out)
    assert_same_tensors(back, state)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    before = checksums(out.parent)
    assert_fails(run("convert", f"--workdir={workdir}", f"--to={out}"), "--to", "exists")
    assert checksums(out.parent) == before


def test_a_trained_run_goes_out_and_in(run, tmp_path):
    flags = ["--config.training.num_steps=3", f"--workdir={tmp_path / 'trained'}"]
    assert_works(run("train", *TINY, *flags))
    trained = {weights: restored(tmp_path / "trained", weights)[1] for weights in ("ema", "raw")}
    for weights, params in trained.items():
        out, workdir = tmp_path / f"{weights}.safetensors", tmp_path / weights
        assert_works(run("convert", f"--workdir={tmp_path / 'trained'}", f"--to={out}", f"--weights={weights}"))
        assert_works(run("convert", f"--from={out}", f"--workdir={workdir}", "--config.model.heads=2"))
        _, back, meta = restored(workdir)
        jax.tree.map(np.testing.assert_array_equal, back, params)
        # Pixels, not latents.
        assert meta["image_shape"] == [8, 8, 1] and meta["config"]["sampling"]["clip"] is True
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, trained.values()), strict=True))


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
    assert "A DiTPipeline" in result.out
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
    assert_fails(run(*export, f"--vae={write_vae(tmp_path / 'vae', 'small')}"), "latents of 16 channels", "draws 4")
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


@pytest.mark.parametrize("name, words", [("dit", ["10 classes, not 1000"]), ("dig", ["DiG", "10 classes"])])
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
    assert_fails(result, "0 classes", "no null label", "not learned", "4 x 8, not square")
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
    assert "note: it predicts v" in result.out


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
        ([new, f"--from={source}", "--vae=x"], ["--vae", "--config.data.vae=DIR"]),
        ([new, f"--from={tmp_path / 'x.safetensors'}"], ["x.safetensors", "cannot be read", "no .safetensors"][:1]),
        ([new, f"--from={tmp_path / 'empty'}"], ["empty", "config.json"]),
        ([new, f"--to={tmp_path / 'y.safetensors'}"], ["no checkpoints"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.onnx'}"], ["y.onnx", ".safetensors"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--config.seed=1"], ["--config.seed"]),
        ([f"--workdir={workdir}", f"--to={tmp_path / 'y.safetensors'}", "--checkpoint_step=5"], ["step 5"]),
        ([f"--workdir={workdir}", "--to=/dev/null/y.safetensors"], ["/dev/null/y.safetensors"]),
    ):
        assert_fails(run("convert", *flags), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x.safetensors"]


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
    assert_fails(run("convert", *flags, f"--config.data.vae={vae}"), "latents of 16 channels", "draws 4")
    assert_fails(run("convert", *flags, "--config.data.vae=/no/such"), "/no/such")
    assert not (tmp_path / "run").exists()


def test_unequal_embedders_are_refused(run, tmp_path):
    arrays = load("diffusers_dit")
    directory = write_diffusers(tmp_path / "source", arrays)
    state, name = diffusers_state(arrays), "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    save_file(state | {name: state[name] + 1}, directory / "diffusion_pytorch_model.safetensors")
    assert_fails(run("convert", f"--from={directory}", f"--workdir={tmp_path / 'run'}"), name)


@pytest.fixture
def torch_state():
    """(torch, the tensors of the published DiT's network)."""
    torch = pytest.importorskip("torch")
    return torch, {name: torch.from_numpy(value) for name, value in section(load("dit"), "state/").items()}


def test_a_checkpoint_that_the_published_training_wrote(run, tmp_path):
    pytest.importorskip("torch")
    assert_works(
        run("convert", f"--from={FIXTURES / 'dit_checkpoint.pt'}", f"--workdir={tmp_path / 'run'}", "--config.model.heads=2")
    )
    assert_computes(tmp_path / "run", load("dit_checkpoint"))
    ema, raw = (restored(tmp_path / "run", weights)[1]["final"]["kernel"] for weights in ("ema", "raw"))
    np.testing.assert_array_equal(raw, 1.5 * ema)


def test_a_pt_round_trip_is_exact(run, torch_state, tmp_path):
    torch, state = torch_state
    torch.save(state, tmp_path / "in.pt")
    assert_works(run("convert", f"--from={tmp_path / 'in.pt'}", f"--workdir={tmp_path / 'run'}", HEADS))
    assert_computes(tmp_path / "run", load("dit"))
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out.pt'}"))
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == torch.float32 for name in state)


class Settings:
    """Stands for OmegaConf's classes, which the reader need not have."""

    def __init__(self):
        self.content = {"seed": 0}


@pytest.mark.parametrize("kind", ["argparse", "SiT", "omegaconf"])
def test_a_training_checkpoint_has_both_weights(run, torch_state, tmp_path, monkeypatch, kind):
    torch, state = torch_state
    module = types.ModuleType("omegaconf.dictconfig")
    module.Settings, Settings.__module__ = Settings, module.__name__
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = {"argparse": argparse.Namespace(lr=1e-4), "SiT": argparse.Namespace(path_type="Linear"), "omegaconf": Settings()}
    moments = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    raw = {name: value if name == "pos_embed" else value + 1 for name, value in state.items()}
    torch.save({"model": raw, "ema": state, "opt": moments, "args": settings[kind], "step": 7}, tmp_path / "7.pt")
    result = run("convert", f"--from={tmp_path / '7.pt'}", f"--workdir={tmp_path / 'run'}", HEADS)
    assert_works(result)
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert meta["config"]["diffusion"]["path"] == ("linear" if kind == "SiT" else "vp")
    assert_computes(tmp_path / "run", load("dit"))
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'raw.safetensors'}", "--weights=raw"))
    assert_same_tensors(load_file(tmp_path / "raw.safetensors"), {name: value.numpy() for name, value in raw.items()})


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pt_is_run(run, torch_state, tmp_path):
    torch, state = torch_state
    (tmp_path / "text.pt").write_text("text")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"lr": 1.0}, tmp_path / "number.pt")
    torch.save({"model": state, "args": Malicious(tmp_path / "hacked")}, tmp_path / "bad.pt")
    cases = {"text": ["torch.save"], "list": ["list"], "number": ["'lr'"], "bad": [f"{os.name}.system", "only tensors"]}
    for name, words in cases.items():
        result = run("convert", f"--from={tmp_path / name}.pt", f"--workdir={tmp_path / 'run'}", HEADS)
        assert_fails(result, f"{name}.pt", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.pt" for name in cases)


def test_half_precision_and_drifted_positions(run, torch_state, tmp_path):
    torch, state = torch_state
    half = {name: value.bfloat16() for name, value in state.items()}
    torch.save(half, tmp_path / "half.pt")
    result = run("convert", f"--from={tmp_path / 'half.pt'}", f"--workdir={tmp_path / 'run'}", HEADS)
    assert_works(result)
    assert "note: its pos_embed is up to 0.002 off" in result.out
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out.safetensors'}"))
    back = load_file(tmp_path / "out.safetensors")
    del back["pos_embed"], half["pos_embed"]
    assert_same_tensors(back, {name: value.float().numpy() for name, value in half.items()})


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


def test_without_torch_a_pt_is_one_line(run, imported, tmp_path):
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed")
    (tmp_path / "x.pt").write_bytes(b"")
    for flags in ([f"--from={tmp_path / 'x.pt'}", f"--workdir={tmp_path / 'run'}"], [f"--to={tmp_path / 'y.pt'}"]):
        assert_fails(run("convert", f"--workdir={imported('dit')[2]}", *flags), "PyTorch", "pip install torch")


def test_help(run):
    result = run("convert", "--help")
    assert "--from" in result.out and "--to" in result.out and "python -m speedit_jax.convert" in result.out
    assert not result.err
