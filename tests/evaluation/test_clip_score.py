"""evaluate --metrics=clip: the score of transformers' CLIP, of drawn images and of a captioned folder, and each mistake."""

import json

import numpy as np
import pytest
from commands import assert_fails, assert_works
from recorded import write_clip

PROMPTS = ["a red blob", "blob. red", "a blob, a blob, a red blob, a blob. a blob"]
NUMBERS = [0, 1, 2, 0, 1, 2, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def drawn(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (len(NUMBERS), 2, 3, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    np.savez(tmp_path / "new.npz", arr_0=images, arr_1=np.array(NUMBERS))
    (tmp_path / "new.json").write_text(json.dumps({"prompts": PROMPTS}))
    return tmp_path / "new.npz"


def cosines(model, images):
    """Of images and their prompts, in PyTorch."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.CLIPModel.from_pretrained(model).eval().requires_grad_(False)
    texts = tokenizer([PROMPTS[i] for i in NUMBERS], return_tensors="pt", padding=True, truncation=True, max_length=16)
    vectors = [
        network.get_image_features(processor(list(images), return_tensors="pt")["pixel_values"]),
        network.get_text_features(**texts),
    ]
    vectors = [getattr(found, "pooler_output", found) for found in vectors]
    return torch.nn.functional.cosine_similarity(*vectors).numpy()


def test_the_score_is_that_of_transformers(run, model, drawn, tmp_path):
    with np.load(drawn) as file:
        expected = 100 * np.maximum(cosines(model, file["arr_0"]), 0)
    assert (expected == 0).any() and len(np.unique(expected.round(1))) > 3  # the random network sees differences
    flags = [f"--images={drawn}", "--metrics=clip", f"--clip={model}", "--batch_size=4"]
    result = run("evaluate", *flags, f"--out={tmp_path / 'numbers.json'}")
    assert_works(result)
    assert "note: 1 prompts are cut at CLIP's 16 tokens, the first of them 'a blob, a blob" in result.out
    record = json.loads((tmp_path / "numbers.json").read_text())
    by_prompt = [expected[np.array(NUMBERS) == i].mean() for i in range(3)]
    error = np.std(by_prompt, ddof=1) / 3**0.5
    assert record["metrics"] == pytest.approx({"clip": expected.mean(), "clip_error": error}, abs=1e-4)
    assert record["features"] is None and record["clip"]["clip"] == str(model) and len(record["clip"]["sha256"]) == 64


def test_mistakes(run, model, drawn, tmp_path):
    flags = [f"--images={drawn}", "--metrics=clip"]
    assert_fails(run("evaluate", *flags), "clip needs --clip=DIR")
    assert_fails(run("evaluate", *flags, f"--clip={tmp_path}"), f"--clip={tmp_path}", "holds no config.json")
    drawn.with_suffix(".json").unlink()
    assert_fails(run("evaluate", *flags, f"--clip={model}"), "--metrics=clip needs the prompts of --images")
