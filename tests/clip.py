"""The small CLIP of fixtures/clip.npz as a directory of transformers."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURE = Path(__file__).parent / "fixtures" / "clip.npz"


@functools.cache
def fixture() -> dict:
    with np.load(FIXTURE) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays | {"text": json.loads(arrays.pop("text").tobytes())}


def weights() -> dict:
    return {name.removeprefix("weights/"): value for name, value in fixture().items() if name.startswith("weights/")}


def write_clip(directory: Path, processor: dict | None = None, **config) -> Path:
    """Its weights in float32, and its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    text = fixture()["text"]
    (directory / "config.json").write_text(json.dumps(text["config"] | config))
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(text["vocabulary"])}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(text["merges"]) + "\n", encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(text["processor"] | (processor or {})))
    found = {name: value.astype(np.float32) for name, value in weights().items()}
    save_file(found | {"logit_scale": np.array(2.6, np.float32)}, directory / "model.safetensors")
    return directory
