"""Text to image by the commands: captions encoded, a run on them, its resume, grids, prompts and refusals."""

import json

import jax
import numpy as np
import pytest
import tiny
from commands import assert_fails, assert_works

import speedit_jax
from speedit_jax.errors import UserError
from speedit_jax.training.run import open_run

TINY = [
    "--config=configs/blobs.py",
    "--config.data.height=8",
    "--config.data.width=8",
    "--config.data.synthetic_size=64",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.scan_unroll=1",
    "--config.optim.schedule=constant",
    "--config.optim.warmup_steps=2",
    "--config.training.num_steps=6",
    "--config.training.batch_size=16",
    "--config.training.log_every=2",
    "--config.training.sample_every=6",
    "--config.checkpoint.every=3",
    "--config.checkpoint.keep_last=9",
    "--config.sampling.num_steps=3",
    "--config.sampling.grid_images=9",
]
PROMPTS = ["--prompt=a red blob at the top", "--prompt=a blue blob"]


@pytest.fixture(scope="module")
def captions(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("captions") / "words"
    assert_works(run("encode_text", "--data=blobs", "--synthetic_size=64", "--encoder=words", f"--out={directory}"))
    return directory


@pytest.fixture(scope="module")
def workdir(run, captions, tmp_path_factory):
    """A finished run on text."""
    workdir = tmp_path_factory.mktemp("text") / "run"
    held_out = ["--config.evaluation.loss_every=6", "--config.evaluation.loss_images=8"]
    result = run("train", *TINY, *held_out, f"--config.data.text={captions}", f"--workdir={workdir}")
    assert_works(result)
    assert "text       words, at most 8 tokens of 64: cross-attention to its tokens" in result.out
    assert "the classes of the data are not given to the network" in result.out
    assert f'python -m speedit_jax.sample --workdir={workdir} --prompt="TEXT"' in result.out
    return workdir


def test_what_a_run_leaves_behind(workdir):
    prompts = json.loads((workdir / "samples" / "prompts.json").read_text())
    assert len(prompts) == 3 and all(text.startswith("a ") and " blob at the " in text for text in prompts)
    page = (workdir / "report.html").read_text()
    assert all(f"<li>{text}</li>" in page for text in prompts)
    meta = json.loads((workdir / "run.json").read_text())
    assert meta["text"]["encoder"]["encoder"] == "words" and (meta["text"]["width"], meta["text"]["length"]) == (64, 8)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout_mse"] > 0


def test_resume_ends_with_the_same_weights(run, captions, workdir, tmp_path):
    flags = [*TINY, f"--config.data.text={captions}", f"--workdir={tmp_path / 'run'}", "--config.training.sample_every=0"]
    assert_works(run("train", *flags, "--config.training.num_steps=3"))
    assert_works(run("train", *flags))
    one = tiny.make_mesh(tiny.ONE)
    ours, theirs = (jax.device_get(open_run(where, mesh=one).restore("raw")) for where in (tmp_path / "run", workdir))
    tiny.assert_same(ours, theirs)


def test_captions_of_another_encoder_are_refused(run, workdir, tmp_path):
    other = tmp_path / "pooled"
    assert_works(run("encode_text", "--data=blobs", "--synthetic_size=64", "--encoder=words", "--pooled", f"--out={other}"))
    flags = [*TINY, f"--config.data.text={other}", f"--workdir={workdir}", "--config.training.num_steps=8"]
    assert_fails(run("train", *flags), "model.text=cross needs the tokens of each caption")
    assert_fails(run("train", *flags, "--config.model.text=pooled"), "the text encoder has changed", "model.text was 'cross'")


def test_prompts(run, workdir, tmp_path):
    out = tmp_path / "drawn"
    flags = [f"--workdir={workdir}", "--num_images=5", "--batch_size=4", "--png_files", f"--out={out}"]
    assert_works(run("sample", *flags, *PROMPTS))
    record = json.loads((tmp_path / "drawn.json").read_text())
    assert record["prompts"] == ["a red blob at the top", "a blue blob"] and record["class_labels"] is None
    assert (record["negative_prompt"], record["text_encoder"]["encoder"]) == ("", "words")
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == sorted(path.name for path in out.glob("*.png"))
    assert [line["text"] for line in lines] == [record["prompts"][i % 2] for i in range(5)]
    with np.load(tmp_path / "drawn.npz") as drawn:
        images = drawn["arr_0"]
        assert drawn["arr_1"].tolist() == [0, 1, 0, 1, 0]
    # The folder has captions again.
    again = run("encode_text", f"--data=folder:{out}", "--encoder=words", f"--out={tmp_path / 'again'}")
    assert_works(again)
    assert (tmp_path / "again" / "captions.jsonl").read_text().splitlines()[1] == '["a blue blob"]'
    # From Python and with an empty negative prompt: the same.
    loaded = speedit_jax.load(workdir)
    prompts = {"prompts": record["prompts"], "num_images": 5, "batch_size": 4}
    np.testing.assert_array_equal(loaded.sample(**prompts), images)
    np.testing.assert_array_equal(loaded.sample(**prompts, negative_prompt=""), images)
    # Six steps teach next to nothing: only strong guidance, of the raw weights, shows the words.
    raw = speedit_jax.load(workdir, weights="raw")
    strong = [raw.sample(**prompts, guidance_scale=1e4, negative_prompt=negative) for negative in ("", "a black blob")]
    assert not np.array_equal(*strong)
    with pytest.warns(UserWarning, match="lost: 'eight'"):
        loaded.sample(prompts=["one two three four five six seven eight"])
    for wrong in ({"labels": [0]}, {"prompts": "text"}, {}):
        with pytest.raises(UserError, match="give prompts="):
            loaded.sample(**wrong)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["was trained on text: give --prompt"]),
        (["--class_labels=0"], ["--class_labels", "give --prompt"]),
        ([*PROMPTS, "--prompts_file=x"], ["not both"]),
        ([*PROMPTS, "--negative_prompt=x", "--guidance_scale=1"], ["no effect without guidance"]),
        ([*PROMPTS, "--text_encoder=nowhere"], ["nowhere"]),
    ],
)
def test_flags_that_do_not_fit(run, workdir, tmp_path, flags, words):
    assert_fails(run("sample", f"--workdir={workdir}", f"--out={tmp_path / 'x'}", *flags), *words)


def test_sparse_guidance_knows_no_negative_prompt(run, captions, tmp_path):
    """Both of its networks get the prompts."""
    route = [f"--config.tokens.{key}" for key in ("method=route", "start=1", "tail=1")] + ["--config.model.depth=3"]
    flags = [*TINY, *route, f"--config.data.text={captions}", f"--workdir={tmp_path / 'run'}", "--config.training.sample_every=0"]
    assert_works(run("train", *flags, "--config.training.num_steps=3"))
    flags = [f"--workdir={tmp_path / 'run'}", *PROMPTS, "--sparse_strong=0.25", "--sparse_weak=0.75", f"--out={tmp_path / 'x'}"]
    assert_fails(run("sample", *flags, "--negative_prompt=x"), "--negative_prompt has no effect with --sparse_weak")
    shares = {"sparse_strong": 0.25, "sparse_weak": 0.75}
    with pytest.raises(UserError, match="negative_prompt has no effect with sparse_weak"):
        speedit_jax.load(tmp_path / "run").sample(prompts=["a blob"], negative_prompt="x", **shares)
    with pytest.raises(UserError, match="negative_prompt has no effect without guidance"):
        speedit_jax.load(tmp_path / "run").sample(prompts=["a blob"], negative_prompt="x", guidance_scale=1)


def test_prompts_for_a_run_on_classes(run, trained, tmp_path):
    result = run("sample", f"--workdir={trained}", f"--out={tmp_path / 'x'}", "--prompt=a cat")
    assert_fails(result, "--prompt", "was not trained on text", "--class_labels")
    with pytest.raises(UserError, match="not trained on text"):
        speedit_jax.load(trained).sample(prompts=["a cat"])


def test_from_classes_to_text(run, captions, tmp_path):
    """That attention to the text adds nothing at first is tests/models/test_text.py's."""
    start = [*TINY, "--config.training.sample_every=0", "--config.model.label_dropout=0.0"]
    assert_works(run("train", *start, "--config.data.text=", f"--workdir={tmp_path / 'classes'}"))
    flags = [*start, f"--config.data.text={captions}", f"--config.init_from={tmp_path / 'classes'}"]
    result = run("train", *flags, f"--workdir={tmp_path / 'text'}", "--config.training.num_steps=3")
    assert_works(result)
    names = "blocks/cross/kv, blocks/cross/out, blocks/cross/q, text/hidden, text/out"
    assert f"text: {names} start anew, without the label table" in result.out


def test_likelihood_of_text_is_refused(run, workdir):
    assert_fails(run("likelihood", f"--workdir={workdir}"), "the run is on text")
