"""The same import a second time: after it worked, after a full disk, and into another's directory."""

import shutil

from commands import assert_fails, assert_works, checksums
from safetensors.numpy import load_file, save_file
from test_pytorch_parity import load

from .networks import HEADS, assert_computes


def test_after_it_worked(run, imported, tmp_path):
    _, source, workdir = imported("dit")
    before = checksums(workdir)
    # Wherever the file is now.
    for path in (source, shutil.copy(source, tmp_path / "copy.safetensors")):
        result = run("convert", f"--from={path}", f"--workdir={workdir}", HEADS)
        assert_works(result)
        assert result.out.startswith("Nothing to do, these weights are already imported:\n") and "Next  python -m" in result.out
    state = load_file(source)
    save_file(state | {"blocks.0.mlp.fc1.bias": state["blocks.0.mlp.fc1.bias"] + 1e-6}, tmp_path / "other.safetensors")
    for flags in ([f"--from={tmp_path / 'other.safetensors'}", HEADS], [f"--from={source}", "--config.model.heads=2"]):
        assert_fails(run("convert", *flags, f"--workdir={workdir}"), f"imported from {source}", "choose another --workdir")
    assert checksums(workdir) == before


def test_over_a_damaged_run_json(run, imported, tmp_path):
    (tmp_path / "run.json").write_text("{")
    result = run("convert", f"--from={imported('dit')[1]}", f"--workdir={tmp_path}", HEADS)
    assert_fails(result, f"{tmp_path}/run.json is damaged", "name another --workdir")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_after_a_full_disk(run, imported, small_disk):
    disk, resize = small_disk
    resize(64)
    convert = ["convert", f"--from={imported('dit')[1]}", f"--workdir={disk / 'run'}", HEADS]
    assert_fails(
        run(*convert), f"--workdir={disk / 'run'}", "the weights need 0.4 MB and 0.1 MB are left", "run the same command again"
    )
    assert not any(disk.iterdir())
    resize(1 << 14)
    result = run(*convert)
    assert_works(result)
    assert "Nothing to do" not in result.out
    assert_computes(disk / "run", load("dit"))
    assert_computes(disk / "run", load("dit"), "raw")


def test_after_it_was_cut_short(run, imported, tmp_path):
    """As the full disk leaves it, where no disk can be made; then another file may take the place, too."""
    _, source, workdir = imported("dit")
    shutil.copytree(workdir, tmp_path / "run")
    for flags in ([HEADS], [HEADS, "--config.model.label_dropout=0"]):
        (tmp_path / "run" / "checkpoints" / "0").rename(tmp_path / "run" / "checkpoints" / "0.orbax-checkpoint-tmp-1")
        result = run("convert", f"--from={source}", f"--workdir={tmp_path / 'run'}", *flags)
        assert_works(result)
        assert "Nothing to do" not in result.out
    assert_computes(tmp_path / "run", load("dit"))
