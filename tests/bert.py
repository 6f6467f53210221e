"""The small BERT of fixtures/bert.npz as a directory of transformers."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURE = Path(__file__).parent / "fixtures" / "bert.npz"


@functools.cache
def fixture() -> dict:
    with np.load(FIXTURE) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays | {"text": json.loads(arrays.pop("text").tobytes())}


def write_bert(directory: Path, prefix: str = "", **config) -> Path:
    """Its weights in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    found = fixture()
    (directory / "config.json").write_text(json.dumps(found["text"]["config"] | config))
    (directory / "vocab.txt").write_text("\n".join(found["text"]["vocabulary"]) + "\n", encoding="utf-8")
    weights = {name.removeprefix("weights/"): value for name, value in found.items() if name.startswith("weights/")}
    save_file({prefix + name: value.astype(np.float32) for name, value in weights.items()}, directory / "model.safetensors")
    return directory
