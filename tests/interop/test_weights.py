"""What a file says of its training."""

import numpy as np
import pytest
from errors import assert_one_line
from safetensors.numpy import save_file

from speedit_jax.interop import weights

STATE = {"x_embedder.proj.weight": np.ones(2, np.float32), "projectors.0.0.weight": np.ones(2, np.float32)}
PLAIN = {"x_embedder.proj.weight": np.ones(2, np.float32)}


def read(tmp_path, content, **settings):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in content.items()}
    torch.save({"model": tensors, "ema": tensors, "args": settings}, tmp_path / "x.pt")
    return weights.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "settings, path, reversed_time",
    [
        ({}, "vp", None),
        ({"path_type": "Linear", "prediction": "velocity"}, "linear", False),
        ({"path_type": "GVP"}, "gvp", False),
        ({"path_type": "linear", "prediction": "v"}, "linear", True),
        ({"path_type": "cosine", "prediction": "v"}, "gvp", True),
    ],
)
def test_flows(tmp_path, settings, path, reversed_time):
    found = read(tmp_path, PLAIN, **settings)
    assert (found.path, found.reversed_time) == (path, reversed_time)


@pytest.mark.parametrize(
    "settings", [{"path_type": "VP"}, {"path_type": "Linear", "prediction": "noise"}, {"path_type": "linear", "prediction": "x"}]
)
def test_flows_that_we_do_not_have(tmp_path, settings):
    assert_one_line(lambda: read(tmp_path, PLAIN, **settings), f"path {settings['path_type']}", "REPA")


def test_repa_is_known_by_its_projectors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    found = weights.read(tmp_path / "x.safetensors")
    assert (found.path, found.reversed_time) == ("linear", True)
    assert found.ema.keys() == PLAIN.keys() and found.raw is found.ema
    assert len(found.notes) == 2 and "projectors" in found.notes[1]


@pytest.mark.parametrize(
    "settings, classes, dropout",
    [({"num_classes": 7, "class_dropout_prob": 0.2}, 7, 0.2), ({"cfg_prob": 0.0}, None, 0.0), ({"num_classes": "7"}, None, None)],
)
def test_labels(tmp_path, settings, classes, dropout):
    found = read(tmp_path, PLAIN, **settings)
    assert (found.num_classes, found.label_dropout) == (classes, dropout)


def test_a_name_on_the_hub_is_downloaded_where_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    assert_one_line(lambda: weights.read(Path("facebook/DiT-XL-2-256")), "no such file", "--from=hf:facebook/DiT-XL-2-256")
    assert_one_line(lambda: weights.read(Path("/no/such")), "no such file")
