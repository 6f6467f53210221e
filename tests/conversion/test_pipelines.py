"""DiTPipelines that diffusers itself saved, in and out again: all three draw the same pictures."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from commands import assert_fails, assert_works
from test_pytorch_parity import nhwc

from speedit_jax.diffusion.samplers import guidance_scales, guided, sample
from speedit_jax.models.vae import load_vae
from speedit_jax.testing.vae_weights import write_vae
from speedit_jax.training import assembly

from .networks import restored

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

LABELS, SCALE, STEPS = [3, 999], 2.5, 10
CASES = {
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, {}),
    "scaled linear, v, fixed variance": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"},
        {"out_channels": 4},
    ),
    "trailing, x0": ({"timestep_spacing": "trailing", "prediction_type": "sample"}, {}),
    "shorter": ({"num_train_timesteps": 400, "beta_start": 3e-4, "beta_end": 0.04}, {"num_attention_heads": 4}),
}
NAMES = {i: f"{name}, {name} {i}" for i, name in enumerate(["tench", "zebra", "Drosophila"] * 333 + ["last"])}


def save(directory, scheduler, names=NAMES, **sizes):
    """A pipeline of random weights; those of the network are of order one, so that time and labels matter."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "norm_num_groups": 1} | sizes
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(**{"out_channels": 8, "norm_eps": 1e-6} | sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    embedders = network.transformer_blocks[0].norm1.emb.state_dict()
    network.transformer_blocks[1].norm1.emb.load_state_dict(embedders)  # as in the published files
    autoencoder = diffusers.AutoencoderKL.from_pretrained(write_vae(directory.with_name("vae"), "four"))
    schedule = diffusers.DDIMScheduler(**{"clip_sample": False} | scheduler)
    diffusers.DiTPipeline(network, autoencoder, schedule).save_pretrained(directory)
    # save_pretrained forgets the names that from_pretrained reads; the published pipelines have them.
    index = directory / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))


def theirs(directory, labels=LABELS):
    pipeline = diffusers.DiTPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(labels, guidance_scale=SCALE, generator=generator, num_inference_steps=STEPS, output_type="np").images


def ours(workdir, labels=LABELS):
    """The same noise, drawn as the run's config says, with as many steps."""
    model, params, meta = restored(workdir)
    config = ml_collections.ConfigDict(meta["config"])
    noise = nhwc(torch.randn((len(labels), 4, 8, 8), generator=torch.Generator().manual_seed(0)).numpy())
    diffusion, labels = assembly.make_diffusion(config), np.array(labels)
    scales = guidance_scales(diffusion.schedule.num_steps, SCALE, "constant", 0.0, 1.0)
    steps = config.sampling.num_steps.replace("50", str(STEPS))

    def draw(noise):
        channels = config.sampling.guidance_channels or 4
        apply = lambda x, t, y: model.apply(params, x, t, y)  # noqa: E731
        denoise = guided(apply, labels, model.null_label, scales, channels, None, diffusion.schedule_index)
        return sample(denoise, noise, diffusion, lambda k: 0 * noise, sampler="ddim", num_steps=steps, clip=config.sampling.clip)

    autoencoder, weights = load_vae(meta["latents"]["vae"])
    return np.clip(jax.jit(autoencoder.decode)(weights, jax.jit(draw)(noise)) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_and_in(run, tmp_path, case):
    scheduler, sizes = CASES[case]
    save(tmp_path / "first", scheduler, **sizes)
    assert_works(run("convert", f"--from={tmp_path / 'first'}", f"--workdir={tmp_path / 'run'}"))
    pictures = theirs(tmp_path / "first")
    assert pictures.std() > 0.1
    np.testing.assert_allclose(ours(tmp_path / "run"), pictures, rtol=0, atol=1e-4)
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert meta["class_names"] == list(NAMES.values())

    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'second'}/"))
    np.testing.assert_allclose(theirs(tmp_path / "second"), pictures, rtol=0, atol=1e-4)
    index = json.loads((tmp_path / "second" / "model_index.json").read_text())
    assert {int(number): name for number, name in index["id2label"].items()} == NAMES

    assert_works(run("convert", f"--from={tmp_path / 'second'}", f"--workdir={tmp_path / 'again'}"))
    np.testing.assert_allclose(ours(tmp_path / "again"), pictures, rtol=0, atol=1e-4)


def test_a_few_classes_of_ones_own(run, tmp_path, capfd):
    """DiTPipeline looks for the null label at 1000: the other rows are padding, and go again."""
    save(tmp_path / "first", {}, {0: "a", 1: "b", 2: "c"}, num_embeds_ada_norm=3)
    flags = ["--config.model.time_freq_shift=0", "--config.diffusion.schedule=cosine"]
    # The transformer alone takes any number of classes.
    assert_works(run("convert", f"--from={tmp_path / 'first'}", f"--workdir={tmp_path / 'run'}"))
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'second'}/"))
    labels = [0, 2]
    pictures = ours(tmp_path / "run", labels)
    np.testing.assert_allclose(theirs(tmp_path / "second", labels), pictures, rtol=0, atol=1e-4)
    assert "3 classes are 0..2" in (tmp_path / "second" / "README.md").read_text()
    assert_works(run("convert", f"--from={tmp_path / 'second'}", f"--workdir={tmp_path / 'again'}"))
    np.testing.assert_allclose(ours(tmp_path / "again", labels), pictures, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "again" / "run.json").read_text())["class_names"] == ["a", "b", "c"]

    # An embedding that diffusers does not know comes back as it was.
    assert_works(run("convert", f"--from={tmp_path / 'first'}", f"--workdir={tmp_path / 'other'}", *flags))
    assert_works(run("convert", f"--workdir={tmp_path / 'other'}", f"--to={tmp_path / 'third'}/"))
    assert_works(run("convert", f"--from={tmp_path / 'third'}", f"--workdir={tmp_path / 'back'}"))
    np.testing.assert_allclose(ours(tmp_path / "back", labels), ours(tmp_path / "other", labels), rtol=0, atol=1e-6)
    capfd.readouterr()
    theirs(tmp_path / "third", labels)
    assert "_time_freq_shift" not in "".join(capfd.readouterr())


def test_what_has_no_equivalent_is_one_line(run, tmp_path):
    save(tmp_path / "first", {"set_alpha_to_one": False})
    new = f"--workdir={tmp_path / 'run'}"
    assert_fails(run("convert", f"--from={tmp_path / 'first'}", new), "set_alpha_to_one=False", "--from=DIR/transformer")
    assert_works(run("convert", f"--from={tmp_path / 'first'}/transformer/", new))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["data"]["vae"] == ""
    names = tmp_path / "first" / "model_index.json"
    names.write_text(json.dumps({"id2label": {"1000": "x"}}))
    (tmp_path / "first" / "scheduler" / "scheduler_config.json").unlink()
    assert_fails(run("convert", f"--from={tmp_path / 'first'}", f"{new}2"), "id2label of class 1000", "1000 classes")
