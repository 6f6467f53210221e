"""The fixtures' networks, recorded from the published codes and from diffusers, before and after an import."""

import json

import jax
import ml_collections
import numpy as np
from safetensors.numpy import save_file
from test_diffusers_parity import diffusers_state
from test_pytorch_parity import assert_close, nhwc

from speedit_jax import sharding
from speedit_jax.models.build import build
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
