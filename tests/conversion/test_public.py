"""What of a run's settings leaves this machine."""

import json

import pytest

from speedit_jax.config import flatten, get_config
from speedit_jax.conversion.public import place, shown


@pytest.mark.parametrize(
    "where, name",
    [
        ("digits", "digits"),
        ("folder:/home/jane/cats/", "folder:cats"),
        ("folder:~/cats", "folder:cats"),
        ("latents:gs://janes-bucket/runs/cats", "latents:cats"),
        ("s3://janes-bucket/reference.npz", "reference.npz"),
        ("tfds:imagenet_resized/32x32", "tfds:imagenet_resized/32x32"),
        ("hf:google/t5-v1_1-base", "hf:google/t5-v1_1-base"),
        ("hf:/home/jane/t5", "hf:t5"),
        ("", ""),
    ],
)
def test_a_place_is_shown_by_its_name(where, name):
    assert place(where) == name


def test_an_autoencoder_on_the_hub_keeps_its_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane" / "vae").mkdir(parents=True)
    found = shown(
        {"data": {"vae": "stabilityai/sd-vae-ft-ema"}, "latents": {"vae": "jane/vae"}, "changes": [{"data.vae": ["/a/b", ""]}]}
    )
    assert found == {
        "data": {"vae": "stabilityai/sd-vae-ft-ema"},
        "latents": {"vae": "vae"},
        "changes": [{"data.vae": ["b", ""]}],
    }


def test_no_setting_shows_a_directory():
    config = get_config().to_dict()
    texts = [key for key, value in flatten(config).items() if isinstance(value, str) and key != "model.name"]
    assert len(texts) > 30
    for key in texts:
        section, _, name = key.rpartition(".")
        for path in ("/home/jane/x", "folder:/home/jane/x", "~jane/x", "s3://jane/x"):
            (config[section] if section else config)[name] = path
            said = json.dumps(shown(config))
            assert "jane" not in said, key
    assert json.loads(said)["model"]["name"] == "DiT-S/2"
