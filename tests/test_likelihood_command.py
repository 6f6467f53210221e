"""The command that measures bits per dimension: its JSON adds up, whatever the batches and devices; mistakes are one line."""

import json
import shutil

import numpy as np
import pytest
from commands import EIGHT_DEVICES, TINY, assert_fails, assert_works

from speedit_jax.conversion import measured
from speedit_jax.training.run import open_run

NUM_STEPS = 60  # more than are done in one call


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run that trains the bound itself."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    schedule = [f"--config.diffusion.num_steps={NUM_STEPS}", "--config.timesteps.strategy=uniform"]
    assert_works(run("train", *TINY, *schedule, "--config.diffusion.loss=rescaled_kl", f"--workdir={workdir}"))
    return workdir


@pytest.fixture(scope="module")
def measure(run, trained, tmp_path_factory):
    def measure(*flags, xla_flags=""):
        out = tmp_path_factory.mktemp("likelihood") / "x.json"
        flags = [f"--workdir={trained}", "--split=held_out", "--num_images=10", f"--out={out}", *flags]
        result = run("likelihood", *flags, xla_flags=xla_flags)
        assert_works(result)
        record = json.loads(out.read_text())
        assert f"{record['total_bpd']:.4f} bits per dimension" in result.out
        return record

    return measure


@pytest.fixture(scope="module")
def ten(measure):
    return measure()


def test_the_loss_is_the_bound_of_the_steps_drawn(trained):
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        np.testing.assert_allclose(record["loss"], NUM_STEPS * record["vb"], rtol=1e-5)


def test_the_terms_add_up(ten):
    terms = ten["by_timestep"]
    assert terms["t"] == list(range(NUM_STEPS))
    assert all(len(terms[name]) == NUM_STEPS and min(terms[name]) > 0 for name in ("vb", "mse", "x0_mse"))
    np.testing.assert_allclose(ten["total_bpd"], ten["prior_bpd"] + sum(terms["vb"]), rtol=1e-9)
    assert ten["decoder_bpd"] == terms["vb"][0]
    assert ten["standard_error"] > 0
    assert ten["images"] == {"from": "digits", "split": "held_out", "n": 10, "of": 355}
    # The last level is nearly noise whatever the images are.
    assert 0 <= ten["prior_bpd"] < 1e-3


def test_a_model_card_takes_it_for_these_weights(trained, ten, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "bits.json").write_text(json.dumps(ten))
    of_card = {weights: measured.numbers(open_run(tmp_path / "run", 6), weights) for weights in ("ema", "raw")}
    (bits,) = of_card["ema"]
    assert (bits.name, bits.value, bits.of) == ("bits per dimension", ten["total_bpd"], "10 images of digits (held_out)")
    assert not of_card["raw"]


def test_batches_and_devices_do_not_matter(measure, ten):
    record = measure("--batch_size=3", xla_flags=EIGHT_DEVICES)
    assert record["devices"] == 8
    for name in ("total_bpd", "standard_error", "prior_bpd"):
        # Ten thousand float32 terms of order one that cancel.
        np.testing.assert_allclose(record[name], ten[name], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(record["by_timestep"]["mse"], ten["by_timestep"]["mse"], rtol=1e-4)


def test_another_seed_is_other_noise_and_other_weights_another_number(measure, ten):
    other = measure("--seed=1", "--unconditional")
    assert other["prior_bpd"] == ten["prior_bpd"] and other["total_bpd"] != ten["total_bpd"]


def test_fewer_levels(measure):
    record = measure("--num_steps=4")
    assert record["num_steps"] == 4 and record["by_timestep"]["t"][0] == 0 and record["by_timestep"]["t"][-1] == NUM_STEPS - 1


def altered(workdir, copy, diffusion, data=(), **changes):
    """A copy of a run whose checkpoints say something else of it; returns the copy."""
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checksums.json"))
    for path in copy.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(path.read_text()) | changes
        meta["config"]["diffusion"] |= diffusion
        meta["config"]["data"] |= dict(data)
        path.write_text(json.dumps(meta))
    return copy


def test_mistakes_are_one_line(run, trained, tmp_path):
    assert_fails(run("likelihood"), "--workdir")
    flow = altered(trained, tmp_path / "flow", {"path": "linear", "loss": "mse"})
    assert_fails(run("likelihood", f"--workdir={flow}"), "diffusion.path=linear", "no variational bound")
    latents = altered(trained, tmp_path / "latents", {}, latents={"vae": "somewhere"})
    assert_fails(run("likelihood", f"--workdir={latents}"), "latents", "pixels")
    imported = altered(trained, tmp_path / "imported", {}, {"source": "synthetic"}, imported_from="w.pt")
    assert_fails(run("likelihood", f"--workdir={imported}", "--unconditional"), "--source is missing", "imported weights")
    workdir = f"--workdir={trained}"
    assert_fails(run("likelihood", workdir, "--split=test"), "data.split=test", "held_out")
    assert_fails(run("likelihood", workdir, "--source=synthetic", "--num_steps=x"), "x", "ddim50")
    assert_fails(run("likelihood", workdir, "--source=synthetic"), "classes", "--unconditional")
    assert_fails(run("likelihood", workdir, "--weights=none"), "--weights=none")
    assert_fails(run("likelihood", workdir, "--out=/dev/null/x"), "/dev/null/x")
