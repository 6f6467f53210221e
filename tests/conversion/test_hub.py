"""convert with the Hugging Face hub: huggingface_hub itself talks to a hub on this machine."""

import json
import re
import shlex

import hub_server
import numpy as np
import pytest
import yaml
from commands import ONE_DEVICE, TINY, assert_fails, assert_works, server
from hub_server import READS, WRITES, Repository
from safetensors.numpy import save_file
from test_pytorch_parity import load, section

from speedit_jax.testing.vae_weights import write_vae

from .networks import HEADS, write_diffusers

FILES = {"README.md", "config.json", "model.safetensors", "samples.png"}


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def speedit(hub, home):
    """speedit(command, *flags, token=""), in the environment of somebody who uses the hub."""
    with server(ONE_DEVICE | hub.environment(home)) as run:

        def speedit(*args, token=""):
            (home / "token").write_text(token)
            return run(*args)

        yield speedit


@pytest.fixture(scope="module")
def trained(speedit, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert_works(speedit("train", *TINY, "--config.training.sample_every=6", f"--workdir={workdir}"))
    return workdir


@pytest.fixture(scope="module")
def pushed(speedit, hub, trained):
    """owner/digits, a run."""
    assert_works(result := speedit("convert", f"--workdir={trained}", "--to=hf:owner/digits", "--license=mit", token=WRITES))
    assert f"{hub.url}/owner/digits" in result.out and "private" in result.out
    return hub.repositories["owner/digits"]


def test_a_run_becomes_a_repository_in_one_commit(pushed, trained):
    assert pushed.private and pushed.files.keys() == FILES
    assert pushed.messages == ["DiT-tiny/2, ema weights of step 6"]
    assert pushed.files["samples.png"] == next((trained / "samples").glob("step_*6.png")).read_bytes()
    card = pushed.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["library_name"] == "speedit_jax" and "dit" in front["tags"]
    for fact in ("digits, split train", "| 6 of 6 |", "| batch size | 16 |", "speedit: ", "decay 0.995", "optim.b2 = 0.99\n"):
        assert fact in card
    assert not any(str(trained.parent).encode() in content for content in pushed.files.values())


def test_the_commands_on_the_card_draw_the_same_bits(speedit, pushed, trained, tmp_path):
    card = (
        pushed.files["README.md"].decode().replace("runs/digits", f"{tmp_path}/run").replace("samples.png", f"{tmp_path}/x.png")
    )
    commands, python = re.findall(r"```(?:python)?\n(.*?)```", card, re.DOTALL)
    for line in commands.splitlines():
        program, *args = shlex.split(line)
        assert program == "speedit"
        assert_works(speedit(*args, token=READS))
    assert_works(speedit("sample", f"--workdir={trained}", "--num_images=16", f"--out={tmp_path}/y.png"))
    drawn, original = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "xy")
    np.testing.assert_array_equal(drawn, original)
    scope = {}
    exec(python, scope)
    assert scope["images"].shape == (16, 8, 8, 1) and scope["images"].dtype == np.uint8
    assert json.loads((tmp_path / "run" / "run.json").read_text())["imported_from"] == f"hf:owner/digits@{pushed.newest}"


def test_other_weights_join_what_is_there(speedit, hub, trained):
    repository = hub.repositories["owner/again"] = Repository(private=False)
    repository.commit({"notes.txt": b"mine", "README.md": b"old"}, "mine")
    flags = [f"--workdir={trained}", "--to=hf:owner/again", "--license=other", "--weights=raw"]
    assert_works(result := speedit("convert", *flags, token=WRITES))
    assert "public" in result.out and "private" not in result.out
    assert repository.files.keys() == FILES | {"notes.txt"}
    assert b"raw weights" in repository.files["README.md"] and repository.messages[1:] == ["DiT-tiny/2, raw weights of step 6"]


def test_only_what_is_read_is_downloaded_of_the_revision_that_is_named(speedit, hub, tmp_path):
    source = tmp_path / "weights.safetensors"
    save_file(section(load("dit"), "state/"), source)
    repository = hub.repositories["other/dit"] = Repository()
    first = repository.commit({source.name: source.read_bytes(), "big.onnx": b"x" * 10_000, "README.md": b"x" * 2_000})
    repository.commit({source.name: b"newer"})
    hub.requests.clear()
    assert_works(result := speedit("convert", f"--from=hf:other/dit@{first}", f"--workdir={tmp_path / 'a'}", HEADS))
    assert hub.downloads() == [source.name]
    assert_works(here := speedit("convert", f"--from={source}", f"--workdir={tmp_path / 'b'}", HEADS))
    assert result.out.replace(f"{tmp_path}/a", "") == here.out.replace(f"{tmp_path}/b", "")


def test_mistakes_are_one_line(speedit, hub, pushed, trained, tmp_path):
    hub.repositories["other/two"] = Repository()
    hub.repositories["other/two"].commit({"a.pt": b"a", "b.pt": b"b", "c.safetensors": b"c"})
    new, old = f"--workdir={tmp_path / 'run'}", [f"--workdir={trained}", "--license=mit"]
    for token, flags, words in (
        (READS, [new, "--from=hf:owner/none"], ["--from=hf:owner/none", "no such model"]),
        (READS, [new, "--from=hf:owner/digits", "--reverse_time"], ["--reverse_time", "other programs"]),
        ("", [new, "--from=hf:other/two"], ["hf:other/two", "a.pt, b.pt", "hf:OWNER/NAME/FILE"]),
        ("", [new, "--from=hf:other/two/c.safetensors"], ["hf:other/two/c.safetensors", "no file of weights"]),
        ("", [*old, "--to=hf:owner/new"], ["--to=hf:owner/new", "token that may write"]),
        (WRITES, [*old, "--to=hf:owner/new", "--checkpoint_step=5"], ["--to=hf:owner/new", "step 5"]),
    ):
        assert_fails(speedit("convert", *flags, token=token), *words)
    assert not (tmp_path / "run").exists() and "owner/new" not in hub.repositories


def test_an_autoencoder_of_the_hub_is_asked_for_once(speedit, hub, tmp_path):
    """data.vae=OWNER/NAME, too, and a pipeline with one in it."""
    source = write_diffusers(tmp_path / "source", load("diffusers_dit"))
    vae = write_vae(tmp_path / "vae", "four")
    files = {f"vae/{path.name}": path.read_bytes() for path in vae.iterdir()}
    hub.repositories["other/vae"] = Repository()
    hub.repositories["other/vae"].commit(files | {"vae/diffusion_pytorch_model.bin": b"x" * 2_000})
    hub.repositories["other/pipeline"] = Repository()
    network = {f"transformer/{path.name}": path.read_bytes() for path in source.iterdir()}
    hub.repositories["other/pipeline"].commit(files | network | {"text_encoder/model.safetensors": b"x" * 2_000})
    flags = [f"--from={source}", "--config.data.vae=other/vae/vae"]
    hub.requests.clear()
    assert_works(speedit("convert", *flags, f"--workdir={tmp_path / 'a'}"))
    assert hub.downloads() == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    hub.requests.clear()
    assert_works(speedit("convert", *flags, f"--workdir={tmp_path / 'b'}"))
    assert not hub.requests
    assert_works(speedit("convert", "--from=hf:other/pipeline", f"--workdir={tmp_path / 'c'}"))
    assert hub.downloads() == sorted([*network, *files])
    identities = [json.loads((tmp_path / workdir / "run.json").read_text())["latents"]["weights"] for workdir in "ac"]
    assert identities[0] == identities[1]
