"""Networks of all kinds as the files of a repository and back: the same parameters and settings."""

import contextlib
import dataclasses
import json

import jax
import pytest
import tiny
from errors import assert_one_line

from speedit_jax import storage
from speedit_jax.config import flatten, get_config
from speedit_jax.conversion import publishing
from speedit_jax.conversion.importing import import_weights
from speedit_jax.conversion.tables import one_device
from speedit_jax.data.description import Description
from speedit_jax.models.condition import TextShape
from speedit_jax.training import assembly
from speedit_jax.training import run as runs
from speedit_jax.training.checkpoint import Checkpoints

pytest.importorskip("huggingface_hub")

IMAGE_FLOW = {"diffusion__path": "linear", "diffusion__prediction": "x0", "diffusion__variance": "fixed_small"}
PARTS = {"model__qk_norm": True, "model__rope": True, "model__mlp": "swiglu", "model__norm": "rms", "model__patch_bottleneck": 8}
LATENTS = {"vae": "/home/jane/vaes/mine", "weights": "1234", "config": {"scaling_factor": 0.5, "shift_factor": None}}
TEXTS = dataclasses.replace(tiny.TEXTS, identity={"encoder": "/home/jane/bert", "pooled": False})
CASES = {
    "DiG": ({"model__name": "DiG-tiny/2"}, {}, "x_embedder.proj.weight"),
    "JiT": (IMAGE_FLOW | PARTS, {}, "blocks.attention.qkv.kernel"),
    "sprint": (
        {"tokens__method": "sprint", "tokens__start": 1, "tokens__tail": 1, "model__depth": 3},
        {},
        "sprint.fusion.kernel",
    ),
    "mask": ({"data__mask": "boxes"}, {}, "blocks.attention.qkv.kernel"),
    "text": ({"model__text": "cross"}, {"texts": TEXTS, "class_names": ()}, "blocks.cross.q.kernel"),
    "latents": (
        {"data__vae": "/home/jane/vaes/mine"},
        {"encoded_by": LATENTS, "image_shape": (8, 8, 4)},
        "x_embedder.proj.weight",
    ),
}


def make_run(workdir, changes, data):
    """A run of random weights whose settings tell where jane keeps her files."""
    places = {"data__source": "folder:/home/jane/cats", "evaluation__reference": "/home/jane/r.npz", "init_from": "/home/jane/a"}
    config = tiny.make_config(**places | changes)
    fields = {"image_shape": tiny.IMAGE, "class_names": tuple("abc"), "fingerprint": "f"} | data
    source = Description(**fields)
    meta = runs.describe(config, source, source.image_shape, source.encoded_by)
    changed = {
        "changes": [{"step": 2, "optim.learning_rate": [1e-4, 2e-4], "data.source": ["folder:/home/jane/dogs", "folder:cats"]}]
    }
    runs.claim(workdir, meta)
    (workdir / "environment.json").write_text(json.dumps([{"command": "train --workdir=/home/jane/a", "devices": 1}]))
    (workdir / "metrics.jsonl").write_text('{"step": 4, "heldout_mse": 0.5}\n{"step": 5, "heldout_mse": 0.25}\n')
    text = source.texts and TextShape.of(source.texts)
    model = assembly.make_model(config, one_device(), source.image_shape, len(source.class_names), text)
    params = tiny.random_like(jax.eval_shape(model.init, jax.random.key(0)))
    with contextlib.closing(Checkpoints(workdir, create=True)) as checkpoints:
        checkpoints.save_weights(4, params, params, meta | changed)
        checkpoints.wait()
    return runs.open_run(workdir, 4, one_device())


@pytest.mark.parametrize("case", CASES)
def test_every_network_comes_back(tmp_path, case):
    changes, data, tensor = CASES[case]
    run = make_run(tmp_path / "run", changes, data)
    (tmp_path / "files").mkdir()
    publishing.write(tmp_path / "files", run, "ema", "owner/name", "other")
    for path in storage.files(tmp_path / "files"):
        assert b"jane" not in path.read_bytes(), path
    assert tensor.encode() in (tmp_path / "files" / "model.safetensors").read_bytes()
    card = (tmp_path / "files" / "README.md").read_text()
    (number,) = json.loads((tmp_path / "files" / "metrics.json").read_text())
    assert (number["name"], number["value"], number["step"]) == ("held-out mse", 0.5, 4) and "| held-out mse | 0.5 | 4 |" in card
    assert "folder:cats" in card and "data.source" in card and "learning_rate was 0.0001, now 0.0002" in card

    import_weights(str(tmp_path / "files"), tmp_path / "back", get_config(), {}, None)
    back = runs.open_run(tmp_path / "back", None, one_device())
    tiny.assert_same(back.restore(), run.restore())
    ours, theirs = (flatten(r.config.to_dict()) for r in (run, back))
    moved = {"data.source", "data.vae", "evaluation.reference", "init_from"}
    assert {key for key in ours if ours[key] != theirs[key]} <= moved
    assert back.meta["class_names"] == run.meta["class_names"] and back.meta["image_shape"] == run.meta["image_shape"]
    assert (back.encoded_by or {}).get("weights") == (run.encoded_by or {}).get("weights")
    assert back.text_encoder == (run.text_encoder and run.text_encoder | {"encoder": "bert"})


def test_settings_that_cannot_be_used_are_one_line(tmp_path):
    run = make_run(tmp_path / "run", *CASES["DiG"][:2])
    (tmp_path / "files").mkdir()
    publishing.write(tmp_path / "files", run, "ema", "owner/name", "other")
    settings = json.loads((tmp_path / "files" / "config.json").read_text())
    newer = settings | {"speedit_jax": "9.0", "config": settings["config"] | {"model": settings["config"]["model"] | {"new": 1}}}
    for wrong, words in (
        (newer, ["9.0", "new"]),
        (settings | {"class_names": 3}, ["class_names"]),
        ({"speedit_jax": "1"}, ["'config'"]),
    ):
        (tmp_path / "files" / "config.json").write_text(json.dumps(wrong))
        assert_one_line(lambda: import_weights(str(tmp_path / "files"), tmp_path / "back", get_config(), {}, None), *words)
