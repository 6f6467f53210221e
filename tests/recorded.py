"""Small networks that transformers was asked about: fixtures/NAME.npz, which fixtures/make_NAME.py wrote."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@functools.cache
def recorded(name: str) -> dict:
    """The arrays, and "text", the JSON among them."""
    with np.load(Path(__file__).parent / "fixtures" / f"{name}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return arrays | {"text": json.loads(arrays.pop("text").tobytes())}


def weights(name: str) -> dict[str, np.ndarray]:
    """The network's tensors, by transformers' names."""
    return {path.removeprefix("weights/"): value for path, value in recorded(name).items() if path.startswith("weights/")}


def write_bert(directory: Path, prefix: str = "", **config) -> Path:
    """The BERT as a directory of transformers, in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    text = recorded("bert")["text"]
    (directory / "config.json").write_text(json.dumps(text["config"] | config))
    (directory / "vocab.txt").write_text("\n".join(text["vocabulary"]) + "\n", encoding="utf-8")
    found = {prefix + name: value.astype(np.float32) for name, value in weights("bert").items()}
    save_file(found, directory / "model.safetensors")
    return directory


def write_clip(directory: Path, processor: dict | None = None, **config) -> Path:
    """The CLIP as a directory of transformers, in float32, and its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    text = recorded("clip")["text"]
    (directory / "config.json").write_text(json.dumps(text["config"] | config))
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(text["vocabulary"])}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(text["merges"]) + "\n", encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(text["processor"] | (processor or {})))
    found = {name: value.astype(np.float32) for name, value in weights("clip").items()}
    save_file(found | {"logit_scale": np.array(2.6, np.float32)}, directory / "model.safetensors")
    return directory


def write_dinov2(directory: Path, kind: str = "mlp", **config) -> Path:
    """A DINOv2 as a directory of transformers; `kind` is its MLP, mlp or swiglu."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(recorded("dinov2")["text"][kind] | config))
    found = {name.removeprefix(f"{kind}/"): value for name, value in weights("dinov2").items() if name.startswith(f"{kind}/")}
    save_file(found, directory / "model.safetensors")
    return directory
