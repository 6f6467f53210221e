"""Evaluation during training: its numbers against NumPy's, what it keeps and records, and each mistake as one line."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny
from errors import assert_one_line
from PIL import Image

from speedit_jax import object_store
from speedit_jax.data.sources import load_digits, open_source
from speedit_jax.evaluation.during_training import Evaluation
from speedit_jax.metrics.frechet import Gaussian, frechet_distance
from speedit_jax.metrics.kernel_distance import kernel_distance
from speedit_jax.metrics.statistics_file import Origin, read_statistics, write_statistics
from speedit_jax.sampling.conditions import Labels
from speedit_jax.sampling.sampler import FixedSamples

COUNT = 50
PIXELS = {"evaluation__every": 10, "evaluation__features": "pixels", "evaluation__num_images": COUNT}


def flat(split):
    return np.round((load_digits(split)[0] + 1) * 127.5).reshape(-1, 64) / 255


def sampler(params, key, indices, labels, null_text):
    """Where a network would draw, the parameters are the pictures."""
    assert (labels == indices % 10).all()
    return np.take(params, indices, axis=0, mode="wrap")


def evaluation(autoencoder=None, sampling=None, source=None, **changes):
    config = tiny.make_config(**({"data__source": "digits", "evaluation__batch_size": 7} | PIXELS | changes))
    mesh = tiny.make_mesh((2, 2, 2))
    pictures = FixedSamples(sampler, autoencoder, Labels(np.arange(10)), jax.random.key(0), config.evaluation.num_images, 4)
    return Evaluation(config, source or open_source(config.data), pictures, sampling or {}, mesh)


@pytest.fixture(scope="module")
def held_out():
    """Of the numbers, the best weights there could be."""
    return load_digits("held_out")[0]


def test_the_numbers_are_numpys(held_out, tmp_path):
    measured = evaluation(evaluation__metrics="kid,fid")
    measured.prepare(tmp_path)
    values = measured(held_out)
    assert list(values) == ["kid", "kid_std", "fid"]
    ours, theirs = flat("held_out")[:COUNT], flat("train")
    moments = [Gaussian(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (ours, theirs)]
    np.testing.assert_allclose(values["fid"], frechet_distance(*moments), rtol=1e-5)
    # KID takes as many of the reference as are drawn, from all over it.
    few = theirs[np.arange(COUNT) * len(theirs) // COUNT]
    expected = kernel_distance(ours.astype(np.float32), few.astype(np.float32), subset_size=COUNT)
    np.testing.assert_allclose((values["kid"], values["kid_std"]), expected, rtol=1e-4, atol=1e-9)


def test_the_reference_is_extracted_once(held_out, tmp_path):
    first = evaluation()
    first.prepare(tmp_path)
    (path,) = tmp_path.iterdir()
    again = evaluation()
    before = path.stat().st_mtime_ns
    again.prepare(tmp_path)
    assert first(held_out) == again(held_out) and path.stat().st_mtime_ns == before

    # It is the file that counts, where there is one: in ADM's format, for evaluate's --reference, too.
    statistics, origin = read_statistics(path, "pixels")
    assert origin == Origin(1442, (8, 8, 1), "none")
    moved = dataclasses.replace(statistics["pool"], mean=statistics["pool"].mean + 1)
    write_statistics(path, {"pool": moved}, "pixels", origin)
    again.prepare(tmp_path)
    assert again(held_out)["fid"] > first(held_out)["fid"] + 60

    evaluation(evaluation__reference="digits", evaluation__split="held_out").prepare(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "another reference is another file"


def test_over_another_background_it_is_another_reference(tmp_path):
    images, kept = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    kept.mkdir()
    for i in range(3):
        Image.new("RGBA", (8, 8), (90 * i, 0, 0, 128)).save(images / f"{i}.png")
    folder = {"data__source": f"folder:{images}", "data__channels": 3}
    for count, background in enumerate(("white", "#ffffff", "black"), 1):
        measured = evaluation(**folder, data__background=background)
        measured.prepare(kept)
        assert len(list(kept.iterdir())) == (count + 1) // 2, background


def test_a_reference_of_statistics_or_of_images(held_out, tmp_path):
    own = evaluation()
    own.prepare(tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(tmp_path / "images.npz", np.round((load_digits("train")[0] + 1) * 127.5).astype(np.uint8))
    for reference in (path, tmp_path / "images.npz", "digits"):
        other = evaluation(evaluation__reference=str(reference))
        other.prepare(tmp_path)
        np.testing.assert_allclose(other(held_out)["fid"], own(held_out)["fid"], rtol=1e-9)


def test_a_reference_in_an_object_store(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "b.png")
    monkeypatch.setattr(object_store, "open_path", {"s3://bucket/images": tmp_path}.__getitem__)
    assert "of folder:s3://bucket/images" in str(evaluation(evaluation__reference="folder:s3://bucket/images"))


def test_records_compare_only_where_the_settings_do():
    values = {"fid": 2.0, "precision": 0.75, "recall": 0.5}
    record = evaluation(evaluation__metrics="fid,pr").record(values)
    assert record["score"] == 2.0 and record["values"] == values
    high = evaluation(evaluation__metrics="fid,pr", evaluation__best="recall").record(values)
    assert high["score"] == -0.5, "a lower score is better"
    assert high["how"] != record["how"]
    for changes in (
        {"evaluation__num_images": 40},
        {"evaluation__seed": 1},
        {"evaluation__reference": "digits", "evaluation__split": "held_out"},
        {"sampling": {"num_steps": (1, 2)}},
    ):
        assert evaluation(**changes).record(values)["how"] != record["how"], changes
    for changes in ({"evaluation__every": 20}, {"evaluation__batch_size": 5}, {"evaluation__reference": "digits"}):
        assert evaluation(**changes).record(values)["how"] == record["how"], changes


LATENTS = types.SimpleNamespace(encoded_by={"vae": "somewhere"}, image_shape=(4, 4, 4))
MISTAKES = {
    "features": ({"evaluation__features": "clip"}, ["evaluation.features", "clip", "pixels"]),
    "weights": ({"evaluation__features": "inception"}, ["evaluation.inception", "https://"]),
    "metric": ({"evaluation__metrics": "fid,foo"}, ["evaluation.metrics", "foo", "sfid"]),
    "metric of Inception": ({"evaluation__metrics": "sfid"}, ["evaluation.metrics", "evaluation.features=inception"]),
    "best": ({"evaluation__best": "kid"}, ["evaluation.best=kid", "evaluation.metrics=fid"]),
    "few images": ({"evaluation__metrics": "fid,pr", "evaluation__num_images": 3}, ["evaluation.num_images has 3", "4"]),
    "reference": ({"evaluation__reference": "/no/such"}, ["/no/such", "FILE.npz"]),
    "shape": ({"evaluation__reference": "digits", "data__source": "synthetic", "data__channels": 3}, ["8x8x1", "8x8x3"]),
    "split": ({"evaluation__split": "held_out"}, ["evaluation.split=held_out", "evaluation.reference"]),
    "too large": ({"data__source": "synthetic", "data__height": 99, "data__width": 99}, ["evaluation.features=pixels", "99x99"]),
    "latents": ({"source": LATENTS}, ["evaluation.every=10", "data.vae"]),
    "latents alone": (
        {"source": LATENTS, "autoencoder": types.SimpleNamespace(image_shape=lambda shape: (32, 32, 3))},
        ["evaluation.reference", "npz"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case):
    changes, words = MISTAKES[case]
    assert_one_line(lambda: evaluation(**changes), *words)


def test_other_numbers_of_features(tmp_path):
    write_statistics(tmp_path / "x.npz", {"pool": Gaussian(np.zeros(5), np.eye(5))}, "pixels", Origin(9))
    assert_one_line(lambda: evaluation(evaluation__reference=str(tmp_path / "x.npz")), "5 features", "64")
    write_statistics(tmp_path / "x.npz", {"pool": Gaussian(np.zeros(5), np.eye(5))}, "inception", Origin(9))
    assert_one_line(lambda: evaluation(evaluation__reference=str(tmp_path / "x.npz")), "of inception features, not of pixels")


def test_statistics_of_another_size(tmp_path):
    path = tmp_path / "x.npz"
    write_statistics(path, {"pool": Gaussian(np.zeros(64), np.eye(64))}, "pixels", Origin(9, (4, 16, 1), "none"))
    assert_one_line(lambda: evaluation(evaluation__reference=str(path)), str(path), "4x16x1", "8x8x1")
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64), features=np.array("pixels"))
    assert f"note: {path} does not say of what size and crop" in str(evaluation(evaluation__reference=str(path)))
    write_statistics(path, {"pool": Gaussian(np.zeros(64), np.eye(64))}, "pixels", Origin(9, (8, 8, 1), "centre"))
    assert "scaled and cropped at the centre, yours were taken as they were" in str(evaluation(evaluation__reference=str(path)))
    write_statistics(path, {"pool": Gaussian(np.zeros(64), np.eye(64))}, "pixels", Origin(9, (8, 8, 1), "none"))
    assert "note" not in str(evaluation(evaluation__reference=str(path)))


def test_numbers_must_be_finite(held_out, tmp_path):
    path = tmp_path / "x.npz"
    write_statistics(path, {"pool": Gaussian(np.full(64, 1e200), np.eye(64))}, "pixels", Origin(9, (8, 8, 1), "none"))
    measured = evaluation(evaluation__reference=str(path))
    measured.prepare(tmp_path)
    assert_one_line(lambda: measured(held_out), "fid is not finite")


def test_pictures_must_be_finite(held_out, tmp_path):
    measured = evaluation()
    measured.prepare(tmp_path)
    spoiled = held_out.copy()
    spoiled[17, 3, 4] = np.nan
    assert_one_line(lambda: measured(spoiled), "hold NaN or infinity")
