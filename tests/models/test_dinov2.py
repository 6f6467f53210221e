"""DINOv2 against transformers' at random weights (fixture, float64), and its resampling against PyTorch's."""

import jax
import numpy as np
import pytest
from errors import assert_one_line
from recorded import recorded, write_dinov2

from speedit_jax.models.dinov2 import bicubic, load_dinov2, positions, resized

RECORDED = recorded("dinov2")


@pytest.fixture(scope="module", params=["mlp", "swiglu"])
def network(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, *load_dinov2(write_dinov2(directory, request.param))


@pytest.mark.parametrize("grid", ["own", "other"])
def test_float32_is_transformers(network, grid):
    """On the grid of its position table, and on one that the table is resampled to."""
    kind, dinov2, params = network
    found = dinov2.apply(params, RECORDED[f"prepared/{grid}"].astype(np.float32))
    np.testing.assert_allclose(found, RECORDED[f"features/{kind}/{grid}"], atol=1e-5)


def test_float64_is_transformers(network):
    """Except for transformers' resampling of the position table, which is in float32 whatever its network is in."""
    kind, dinov2, params = network
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, params)
        for grid, tolerance in (("own", 1e-12), ("other", 1e-6)):
            found = dinov2.apply(params, RECORDED[f"prepared/{grid}"])
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, RECORDED[f"features/{kind}/{grid}"], atol=tolerance)


def test_bfloat16_is_near(network, tmp_path):
    kind, _, params = network
    dinov2, _ = load_dinov2(write_dinov2(tmp_path, kind), jax.numpy.bfloat16)
    found, wanted = dinov2.apply(params, RECORDED["prepared/own"].astype(np.float32)), RECORDED[f"features/{kind}/own"]
    # 2^-9 a product of which there are a dozen one after another.
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


@pytest.mark.parametrize(("size", "out"), [(10, 7), (7, 10), (5, 5), (37, 16), (1, 3)])
def test_resampling_is_pytorchs(size, out):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 3, size, 4))
    wanted = torch.nn.functional.interpolate(torch.tensor(x), (out, 4), mode="bicubic").numpy()
    np.testing.assert_allclose(np.einsum("oi,ncik->ncok", bicubic(size, out), x), wanted, atol=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resampled_as_in_transformers_or_repa(antialias):
    """REPA's code leaves it to timm, which calls this function of PyTorch with antialiasing; from 37 x 37 to 16 x 16."""
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((1, 37, 37, 2))
    size = {"size": (16, 16), "mode": "bicubic", "antialias": antialias}
    wanted = torch.nn.functional.interpolate(torch.tensor(table).permute(0, 3, 1, 2), **size).permute(0, 2, 3, 1)
    with jax.enable_x64(True):
        found = positions(jax.numpy.asarray(table), (16, 16), antialias)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-12)


def test_resampling_of_a_picture():
    """What of the recorded pictures was prepared for the network."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with jax.enable_x64(True):
        found = resized(jax.numpy.asarray((RECORDED["pictures"] - mean) / std), (6, 15))
    np.testing.assert_allclose(found, RECORDED["prepared/other"], atol=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "dinov2_with_registers"}, "dinov2_with_registers"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"num_hidden_layers": 1}, "extra encoder.layer.1"),
    ],
)
def test_other_networks_are_refused(tmp_path, config, words):
    assert_one_line(lambda: load_dinov2(write_dinov2(tmp_path, **config)), words)
