"""Files of torch.save in and out, by the command itself."""

import argparse
import json
import os
import sys
import types

import numpy as np
import pytest
from commands import assert_fails, assert_works
from safetensors.numpy import load_file
from test_pytorch_parity import FIXTURES, load, section

from .networks import HEADS, assert_computes, assert_same_tensors, restored


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
    torch.save({"model": state, "opt": Malicious(tmp_path / "hacked")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"lr": 1.0}, tmp_path / "number.pt")
    torch.save({"model": state, "args": Malicious(tmp_path / "hacked")}, tmp_path / "bad.pt")
    cases = {
        "text": ["torch.save"],
        "list": ["list"],
        "number": ["missing x_embedder.proj.weight", "lr (float)"],
        "bad": [f"{os.name}.system", "only tensors"],
        "old": [f"{os.name}.system", "only tensors"],
    }
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
    assert "note: its pos_embed is up to 0.002 away" in result.out
    assert_works(run("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out.safetensors'}"))
    back = load_file(tmp_path / "out.safetensors")
    del back["pos_embed"], half["pos_embed"]
    assert_same_tensors(back, {name: value.float().numpy() for name, value in half.items()})


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "data parallel": (lambda raw, ema: {"model": prefixed("module.", raw), "ema": ema}, "model.module"),
    "compiled": (lambda raw, ema: prefixed("_orig_mod.", ema), "_orig_mod"),
    "nested": (lambda raw, ema: {"state_dict": ema, "epoch": 3}, "state_dict"),
    "NumPy numbers": (lambda raw, ema: {"model": raw, "ema": ema, "fid": np.float64(12.5), "rng": np.random.get_state()}, ""),
    "no raw weights": (lambda raw, ema: {"model": None, "ema": ema}, "'model' holds no network"),
    "raw weights in part": (lambda raw, ema: {"model": dict(list(raw.items())[:-1]), "ema": ema}, "its raw weights do not fit"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_whatever_is_around_the_weights(run, torch_state, tmp_path, kind):
    torch, state = torch_state
    wrap, note = WRAPPED[kind]
    torch.save(wrap({name: value + 1 for name, value in state.items() if name != "pos_embed"}, state), tmp_path / "x.ckpt")
    result = run("convert", f"--from={tmp_path / 'x.ckpt'}", f"--workdir={tmp_path / 'run'}", HEADS)
    assert_works(result)
    assert note in result.out
    assert_computes(tmp_path / "run", load("dit"))


def test_what_is_no_network_is_one_line(run, torch_state, tmp_path):
    torch, state = torch_state
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(), tmp_path / "opt.pt")
    broken = state | {"blocks.1.mlp.fc2.bias": state["blocks.1.mlp.fc2.bias"] * float("nan")}
    torch.save({"model": state, "ema": broken}, tmp_path / "nan.pt")
    torch.save({name: (value * 1e5).half() for name, value in state.items()}, tmp_path / "half.pt")
    for name, words in {
        "opt": ["state of an optimizer"],
        "nan": ["blocks.1.mlp.fc2.bias is not finite"],
        "half": ["is not finite", "half precision"],
    }.items():
        assert_fails(run("convert", f"--from={tmp_path / name}.pt", f"--workdir={tmp_path / 'run'}", HEADS), f"{name}.pt", *words)
    assert not (tmp_path / "run").exists()


def test_saved_settings_decide_about_the_null_label(run, torch_state, tmp_path):
    torch, state = torch_state
    for classes, dropout in ((10, 0.1), (11, 0.0)):
        settings = argparse.Namespace(num_classes=classes, class_dropout_prob=dropout)
        torch.save({"model": state, "ema": state, "args": settings}, tmp_path / f"{classes}.pt")
        result = run("convert", f"--from={tmp_path / f'{classes}.pt'}", f"--workdir={tmp_path / str(classes)}", HEADS)
        assert_works(result)
        assert f"{classes} classes" in result.out and "label_dropout" not in result.out
        assert_computes(tmp_path / str(classes), load("dit"))
