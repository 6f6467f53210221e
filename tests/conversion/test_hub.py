"""convert with the Hugging Face hub: huggingface_hub itself talks to a hub on this machine."""

import json
import re
import shlex

import hub_server
import numpy as np
import pytest
import yaml
from commands import ONE_DEVICE, assert_fails, assert_works, run_alone, server
from hub_server import READS, WRITES, Repository

from .networks import HEADS

FILES = {"README.md", "config.json", "metrics.json", "model.safetensors", "samples.png"}


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
    for fact in (
        "digits, split train",
        "| 6 of 6 |",
        "| batch size | 16 |",
        "speedit:",
        "decay 0.995",
        "not of Inception's features",
    ):
        assert fact in card
    numbers = {number["name"]: number for number in json.loads(pushed.files["metrics.json"])}
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert numbers["fid (pixels)"]["value"] == [line["eval_fid"] for line in logged if "eval_fid" in line][-1]
    assert not any(
        str(trained.parent) in content.decode() for name, content in pushed.files.items() if name.endswith((".json", ".md"))
    )


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


def test_a_second_push_is_a_new_commit_beside_what_is_there(speedit, hub, trained):
    repository = hub.repositories["owner/again"] = Repository(private=False)
    repository.commit({"notes.txt": b"mine", "README.md": b"old"}, "mine")
    flags = [f"--workdir={trained}", "--to=hf:owner/again", "--license=other", "--weights=raw"]
    assert_works(result := speedit("convert", *flags, token=WRITES))
    assert "public" in result.out and "private" not in result.out
    assert repository.files.keys() >= FILES - {"metrics.json"} and repository.files["notes.txt"] == b"mine"
    assert b"raw weights" in repository.files["README.md"] and repository.messages[1:] == ["DiT-tiny/2, raw weights of step 6"]
    assert_works(speedit("convert", *flags, token=WRITES))
    assert len(repository.messages) == 2


def test_only_what_is_read_is_downloaded_of_the_revision_that_is_named(speedit, hub, imported, tmp_path):
    _, source, _ = imported("dit")
    repository = hub.repositories["other/dit"] = Repository()
    first = repository.commit({"weights.safetensors": source.read_bytes(), "big.onnx": b"x" * 10_000, "README.md": b"x" * 2_000})
    repository.commit({"weights.safetensors": b"newer"})
    hub.requests.clear()
    assert_works(result := speedit("convert", f"--from=hf:other/dit@{first}", f"--workdir={tmp_path / 'a'}", HEADS))
    assert hub.downloads() == ["weights.safetensors"]
    assert_works(here := speedit("convert", f"--from={source}", f"--workdir={tmp_path / 'b'}", HEADS))
    assert result.out.replace(f"{tmp_path}/a", "") == here.out.replace(f"{tmp_path}/b", "")
    # With the newest commit the same name holds something else.
    assert_fails(
        speedit("convert", "--from=hf:other/dit", f"--workdir={tmp_path / 'c'}", HEADS), "hf:other/dit", "no file of weights"
    )


def test_what_cannot_be_is_one_line(speedit, hub, pushed, trained, tmp_path):
    hub.repositories["other/two"] = Repository()
    hub.repositories["other/two"].commit({"a.pt": b"a", "b.pt": b"b"})
    hub.repositories["other/gated"] = Repository(gated=True)
    hub.repositories["other/gated"].commit({"a.pt": b"a"})
    new, old = f"--workdir={tmp_path / 'run'}", [f"--workdir={trained}", "--license=mit"]
    for token, flags, words in (
        ("", [new, "--from=hf:other/none"], ["hf:other/none", "no such model", "HF_TOKEN"]),
        (READS, [new, "--from=hf:other/none"], ["no such model", "check the name"]),
        ("", [new, "--from=hf:owner/digits"], ["hf:owner/digits", "private", "hf auth login"]),
        ("wrong", [new, "--from=hf:owner/digits"], ["refuses the token", "settings/tokens"]),
        (READS, [new, "--from=hf:owner/digits@v9"], ["no revision 'v9'"]),
        (READS, [new, "--from=hf:owner/digits/x.pt"], ["no x.pt"]),
        (READS, [new, "--from=hf:a--b/c"], ["a--b/c"]),
        ("", [new, "--from=hf:other/two"], ["a.pt, b.pt", "hf:OWNER/NAME/FILE"]),
        (READS, [new, "--from=hf:other/gated"], ["gated", f"{hub.url}/other/gated"]),
        (READS, [new, "--from=hf:owner/digits", "--reverse_time"], ["--reverse_time", "other programs"]),
        ("", [*old, "--to=hf:owner/new"], ["hf:owner/new", "token that may write", "HF_TOKEN"]),
        (READS, [*old, "--to=hf:owner/new"], ["may not do this", "settings/tokens", "nothing was uploaded"]),
        (WRITES, [*old, "--to=hf:other/new"], ["may not do this", "'other'"]),
        (WRITES, [*old[:1], "--license=mine", "--to=hf:owner/new"], ["license", "apache-2.0", "nothing was uploaded"]),
        (WRITES, [*old, "--to=hf:owner/new", "--checkpoint_step=5"], ["step 5"]),
    ):
        assert_fails(speedit("convert", *flags, token=token), *words)
    assert not (tmp_path / "run").exists() and not hub.repositories["owner/new"].messages


def test_without_the_hub_the_cache_serves_and_what_is_not_there_is_one_line(speedit, hub, home, pushed, trained, tmp_path):
    assert_works(speedit("convert", "--from=hf:owner/digits", f"--workdir={tmp_path / 'a'}", token=READS))
    asked = f"--from=hf:owner/digits --workdir={tmp_path / 'a'}", f"--from=hf:owner/none --workdir={tmp_path / 'b'}"
    hub.failing = "."
    try:
        assert_works(result := speedit("convert", *asked[0].split(), token=READS))
        assert "taken from the cache" in result.out and "Nothing to do" in result.out
        hub.silent = True
        assert_fails(speedit("convert", *asked[1].split()), "hf:owner/none", hub.url, "timed out", "cache has not got it")
        assert_fails(speedit("convert", "--to=hf:owner/none", "--license=mit", f"--workdir={trained}", token=WRITES), hub.url)
    finally:
        hub.failing, hub.silent = "$^", False
    closed = hub.environment(home) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_fails(
        run_alone("convert", *asked[1].split(), **closed), "no connection to the hub at http://127.0.0.1:9", "HF_ENDPOINT"
    )
    assert_fails(run_alone("convert", *asked[1].split(), **closed | {"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE", "cache")


def test_an_upload_that_breaks_off_leaves_the_old_commit(speedit, hub, pushed, trained):
    repository = hub.repositories["owner/broken"] = Repository()
    for failing in ("/api/validate-yaml", "/commit/"):
        hub.failing = failing
        try:
            result = speedit("convert", f"--workdir={trained}", "--to=hf:owner/broken", "--license=mit", token=WRITES)
        finally:
            hub.failing = "$^"
        assert_fails(result, "--to=hf:owner/broken", "503", "nothing was uploaded")
    assert not repository.files


def test_an_autoencoder_of_the_hub_is_asked_for_once(speedit, hub, imported, tmp_path):
    """data.vae=OWNER/NAME, too, and a pipeline with one in it."""
    from speedit_jax.testing.vae_weights import write_vae

    _, source, _ = imported("diffusers_dit")
    vae = write_vae(tmp_path / "vae", "four")
    files = {f"vae/{path.name}": path.read_bytes() for path in vae.iterdir()}
    hub.repositories["other/vae"] = Repository()
    hub.repositories["other/vae"].commit(files | {"vae/diffusion_pytorch_model.bin": b"x" * 2_000})
    hub.repositories["other/pipeline"] = Repository()
    network = {f"transformer/{path.name}": path.read_bytes() for path in source.iterdir()}
    hub.repositories["other/pipeline"].commit(files | network | {"text_encoder/model.safetensors": b"x" * 2_000})
    hub.requests.clear()
    flags = [f"--from={source}", "--config.data.vae=other/vae/vae"]
    for workdir in "ab":
        assert_works(speedit("convert", *flags, f"--workdir={tmp_path / workdir}"))
    assert hub.downloads() == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    hub.requests.clear()
    assert_works(speedit("convert", "--from=hf:other/pipeline", f"--workdir={tmp_path / 'c'}"))
    assert hub.downloads() == sorted([*network, *files])
    identities = [json.loads((tmp_path / workdir / "run.json").read_text())["latents"]["weights"] for workdir in "ac"]
    assert identities[0] == identities[1]
    assert_fails(
        speedit("convert", f"--from={source}", "--config.data.vae=other/none", f"--workdir={tmp_path / 'd'}"), "other/none"
    )
