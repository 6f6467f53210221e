"""Downloads and uploads: huggingface_hub itself talks to a hub on this machine, in processes that import little else."""

import json
import os
import subprocess
import sys

import hub_server
import pytest
from commands import ROOT
from hub_server import READS, WRITES, Repository

# Reads [[token, function, argument, ...], ...] and answers each by what it returns, or the error's line.
SCRIPT = """
import json, os, sys
from pathlib import Path
from speedit_jax.errors import UserError
from speedit_jax.interop import model_hub

def download(where):
    path, commit = model_hub.download(model_hub.parse(where), lambda names: ("", ["a.bin"] if "a.bin" in names else names))
    return [sorted(file.name for file in path.iterdir()), commit]

def publish(repository, directory):
    return model_hub.publish(repository, Path(directory), "message", False)

for token, function, *arguments in json.load(sys.stdin):
    Path(os.environ["HF_HOME"], "token").write_text(token)
    try:
        print(json.dumps({"download": download, "publish": publish, "check": model_hub.check_access}[function](*arguments)))
    except UserError as e:
        print(json.dumps(str(e)))
"""


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        hub.repositories["owner/private"] = Repository(private=True)
        hub.repositories["other/gated"] = Repository(gated=True)
        for repository in hub.repositories.values():
            repository.commit({"a.bin": b"a" * 2_000, "b.txt": b"b" * 20})
        yield hub


@pytest.fixture
def ask(hub, tmp_path):
    """ask([token, function, argument, ...], ...) -> the answers; each test has a cache of its own."""

    def ask(*calls, **variables):
        (tmp_path / "home").mkdir(exist_ok=True)
        env = dict(os.environ) | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=env, input=json.dumps(calls), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and not done.stderr, done
        return [line if line.startswith("note: ") else json.loads(line) for line in done.stdout.splitlines()]

    return ask


def test_each_refusal_is_one_line_with_a_way_out(ask, hub, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("---\nlicense: gplish\n---\n")
    files = str(tmp_path / "files")
    cases = (
        (["", "download", "hf:other/none"], ["no such model", "check the name", "HF_TOKEN"]),
        ([READS, "download", "hf:other/none"], ["no such model", "check the name"]),
        (["", "download", "hf:owner/private"], ["private", "hf auth login"]),
        (["wrong", "download", "hf:owner/private"], ["refuses the token", "settings/tokens"]),
        ([READS, "download", "hf:owner/private@v9"], ["no revision 'v9'", "a branch, a tag or a commit"]),
        ([READS, "download", "hf:a--b/c"], ["a--b/c"]),
        ([READS, "download", "hf:other/gated"], ["gated", f"{hub.url}/other/gated"]),
        (["", "check", "owner/private"], ["token that may write", "HF_TOKEN"]),
        ([READS, "publish", "owner/new", files], ["may not do this", "settings/tokens", "nothing was uploaded"]),
        ([WRITES, "publish", "other/new", files], ["may not do this", "'other'"]),
        ([WRITES, "publish", "owner/new", files], ["license", "apache-2.0", "nothing was uploaded"]),
    )
    for (call, words), line in zip(cases, ask(*(call for call, _ in cases)), strict=True):
        assert isinstance(line, str) and "\n" not in line and all(word in line for word in words), (call, line)
    assert not hub.repositories["owner/new"].messages


def test_the_cache_serves_where_the_hub_does_not(ask, hub):
    commit = hub.repositories["owner/private"].newest
    call = [READS, "download", "hf:owner/private"]
    assert ask(call, [READS, "download", f"hf:owner/private@{commit}"]) == [[["a.bin"], commit]] * 2
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for variables in ({"HF_HUB_OFFLINE": "1"}, gone):
        note, found, line = ask(call, [READS, "download", "hf:owner/none"], **variables)
        assert note.startswith("note: the hub cannot be reached; hf:owner/private is taken from the cache")
        assert found == [["a.bin"], commit] and "the cache has not got it" in line
        assert "HF_HUB_OFFLINE" in line if variables != gone else "no connection to the hub at http://127.0.0.1:9" in line
    hub.failing = "."
    try:
        assert ask(call)[1] == [["a.bin"], commit]
        hub.silent = True
        timed_out = ask([WRITES, "download", "hf:owner/none"], [WRITES, "check", "owner/private"])
    finally:
        hub.failing, hub.silent = "$^", False
    assert all(f"no connection to the hub at {hub.url}" in line for line in timed_out)


def test_an_upload_is_one_commit_or_none(ask, hub, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "files" / "a.bin").write_bytes(b"new" * 2_000)
    call = [WRITES, "publish", "owner/mine", str(tmp_path / "files")]
    repository = hub.repositories["owner/mine"] = Repository()
    repository.commit({"a.bin": b"old", "notes.txt": b"mine"})
    before = repository.newest
    for failing in ("/api/validate-yaml", "/commit/"):
        hub.failing = failing
        try:
            (line,) = ask(call)
        finally:
            hub.failing = "$^"
        assert "503" in line and "nothing was uploaded" in line
    assert repository.newest == before
    first, second = ask(call, call)  # the same files again are no commit
    assert first == second == [f"{hub.url}/owner/mine/commit/{repository.newest}", []]
    assert list(repository.commits)[-2] == before and repository.messages[1:] == ["message"]
    assert repository.files["a.bin"] == b"new" * 2_000 and repository.files["notes.txt"] == b"mine"
    assert ask([WRITES, "check", "owner/mine"], [WRITES, "check", "owner/none"]) == [True, None]
