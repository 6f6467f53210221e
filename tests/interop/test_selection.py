"""Which files of a repository are downloaded."""

import pytest
from errors import assert_one_line

from speedit_jax.interop.selection import needed

W, INDEX, SCHEDULER = "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler/scheduler_config.json"
TRANSFORMER, VAE = [[f"{part}/config.json", f"{part}/{W}"] for part in ("transformer", "vae")]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FP16 = ["model.fp16-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    "names, path, opened, wanted",
    [
        (["README.md", "DiT-XL-2.pt", "logo.png"], "", "DiT-XL-2.pt", ["DiT-XL-2.pt"]),
        (["a.pt", "b/c.pt", "README.md"], "b/c.pt", "b/c.pt", ["b/c.pt"]),
        (["a.pt", "b/c.pt", "README.md"], "b", "b/c.pt", ["b/c.pt"]),
        (["model.safetensors", "model.bin", "config.json", "x.pt"], "", "", ["model.safetensors", "config.json"]),
        ([*SHARDS, *FP16, "model.safetensors.index.json"], "", "", ["model.safetensors.index.json", *SHARDS]),
        ([*FP16, "model.safetensors.index.fp16.json"], "", "", ["model.safetensors.index.fp16.json", *FP16]),
        (
            [*SHARDS, "model.safetensors.index.json"],
            "model.safetensors.index.json",
            "model.safetensors.index.json",
            [*SHARDS, "model.safetensors.index.json"],
        ),
        (
            [
                INDEX,
                *TRANSFORMER,
                *VAE,
                "vae/diffusion_pytorch_model.bin",
                SCHEDULER,
                "text_encoder/model.safetensors",
                "README.md",
            ],
            "",
            "",
            [INDEX, *TRANSFORMER, *VAE, SCHEDULER],
        ),
        ([INDEX, *TRANSFORMER, *VAE], "transformer", "transformer", TRANSFORMER),
    ],
)
def test_no_more_than_is_read(names, path, opened, wanted):
    found, files = needed(names, path)
    assert found == opened
    assert sorted(files) == sorted(wanted)


@pytest.mark.parametrize(
    "names, path, words",
    [
        (["README.md"], "", ["no weights", "README.md"]),
        (["a.pt", "b.pt"], "", ["several", "a.pt, b.pt", "hf:OWNER/NAME/FILE"]),
        (["a.pt"], "b.pt", ["no b.pt", "a.pt"]),
        (["model.fp16.safetensors", "model.ema.safetensors"], "", ["model.ema.safetensors", "model.fp16.safetensors"]),
        ([], "", ["no weights", "no files"]),
    ],
)
def test_what_is_not_clear_is_one_line(names, path, words):
    assert_one_line(lambda: needed(names, path), *words)
