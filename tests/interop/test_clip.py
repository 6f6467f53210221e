"""Files of a CLIP: what a config may leave out, and what is refused."""

import json

import pytest
from errors import assert_one_line
from recorded import recorded, write_clip
from safetensors.numpy import load_file, save_file

from speedit_jax.interop.clip import read_processor
from speedit_jax.models.clip import ClipConfig, load_clip


def test_what_a_config_leaves_out_is_of_vit_b_32():
    found = ClipConfig.of({"text_config": {}, "vision_config": None, "text_config_dict": {"hidden_size": 640}})
    assert (found.text.hidden_size, found.text.num_attention_heads, found.text.max_position_embeddings) == (640, 8, 77)
    assert (found.image.hidden_size, found.image.patch_size, found.projection_dim) == (768, 32, 512)


def test_sizes_of_older_processors(tmp_path):
    write_clip(tmp_path, processor={"size": 12, "crop_size": 12})
    assert (read_processor(tmp_path)["size"], read_processor(tmp_path)["crop_size"]) == (12, 12)
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_processor(tmp_path) == {}


def lose_a_tensor(directory):
    state = load_file(directory / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, directory / "model.safetensors")


def edit_processor(**changes):
    def harm(directory):
        path = directory / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def of_text(**changes):
    return lambda directory: write_clip(directory, text_config=recorded("clip")["text"]["config"]["text_config"] | changes)


FAULTS = {
    "another kind": (lambda d: write_clip(d, model_type="siglip"), ["is a siglip, not a clip"]),
    "one tower": (lambda d: write_clip(d, model_type="clip_text_model"), ["clip_text_model", "both towers"]),
    "another size": (of_text(hidden_size=10), ["model.safetensors", "has shape (65, 8), not (65, 10)"]),
    "another activation": (of_text(hidden_act="relu"), ["text_config: hidden_act=relu", "quick_gelu"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["holds no model.safetensors"]),
    "a missing tensor": (lose_a_tensor, ["model.safetensors", "missing visual_projection.weight"]),
    "no crop": (edit_processor(do_center_crop=False), ["do_center_crop is false"]),
    "stretched": (edit_processor(size={"height": 12, "width": 12}), ["size is not the shortest_edge"]),
    "not square": (edit_processor(crop_size={"height": 12, "width": 10}), ["crop_size is not a square"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(tmp_path, case):
    harm, words = FAULTS[case]
    harm(write_clip(tmp_path))

    def read():
        load_clip(tmp_path)
        read_processor(tmp_path)

    assert_one_line(read, *words)
