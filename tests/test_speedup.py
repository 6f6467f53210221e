"""The comparison of strategies, benchmarks/speedup: the whole pipeline in seconds, and that it is honest."""

import contextlib
import gzip
import io
import json
import shutil
import signal
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks.speedup import analysis, pictures, report, resample
from benchmarks.speedup.__main__ import fill
from benchmarks.speedup.data import open_set
from benchmarks.speedup.judge import Judge, Panel
from benchmarks.speedup.piece import Run
from benchmarks.speedup.plan import (
    ATTEMPTS,
    FIRST,
    ON_EMOJI,
    PAIRS,
    PHASES,
    RATES,
    SCALES,
    STRATEGIES,
    WITHOUT,
    Piece,
    make_config,
    pieces,
)
from speedit_jax.data.description import Description
from speedit_jax.errors import UserError
from speedit_jax.sampling.sampler import Settings, make_sampler
from speedit_jax.sharding import make_mesh
from speedit_jax.training import step as step_module
from speedit_jax.training.assembly import assemble

SCALE = SCALES["rehearsal"]
MADE = [Piece("rehearsal", "digits", name, 0) for name in ("uniform", "speedit", "gradient_noise", "logit_normal_v")]
OTHER = Piece("rehearsal", "digits", "uniform", 1)


@contextlib.contextmanager
def signals_kept():
    """The comparison listens to Ctrl-C; pytest wants it back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(directory of raw numbers, {piece: its record}, {piece: the noise that its steps used, in turn})."""
    root, noise, seen = tmp_path_factory.mktemp("speedup"), {}, []
    make_loss = step_module.make_loss

    def watched(model, diffusion):
        loss = make_loss(model, diffusion)

        def watching(params, batch):
            if len(batch["t"]) == SCALE.batch_size:  # not a probe's share of it
                jax.debug.callback(lambda x: seen.append(np.array(x)), batch["noise"])
            return loss(params, batch)

        return watching

    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(step_module, "make_loss", watched)
        for piece in [*MADE, OTHER]:
            seen.clear()
            assert fill([piece], root / "out", root / "work", 600) == 0
            jax.effects_barrier()
            noise[piece] = list(seen)
    records = analysis.read(root / "out", "rehearsal")
    assert records.keys() == {*MADE, OTHER}
    return root, records, noise


def test_all_sides_see_the_same(rehearsal):
    _, records, noise = rehearsal
    uniform, others = records[MADE[0]], [records[piece] for piece in MADE[1:]]
    for other in others:
        for name in ("initial_weights", "data_digest", "evaluation", "judge", "parameters"):
            assert other[name] == uniform[name], name
        for row, reference in zip(other["rows"], uniform["rows"], strict=True):
            assert (row["step"], row["images_trained_on"]) == (reference["step"], reference["images_trained_on"])
            assert row["data_digest"] == reference["data_digest"]
            assert row["weights"].keys() == reference["weights"].keys()
            assert row["loss"] != reference["loss"], "another strategy has another loss"
    assert len(noise[MADE[0]]) == SCALE.num_steps
    for piece in MADE[1:]:
        # Compiled with other timesteps about it, the same noise is rounded otherwise.
        np.testing.assert_allclose(noise[piece], noise[MADE[0]], rtol=0, atol=2e-6)


def test_a_flow_is_measured_too(rehearsal, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(rehearsal[0] / "out" / "judge_digits.npz", tmp_path / "out")
    with signals_kept():
        assert fill([Piece("rehearsal", "digits", "flow_x0_patch16", 0)], tmp_path / "out", tmp_path / "work", 600) == 0
    (record,) = analysis.read(tmp_path / "out", "rehearsal").values()
    measured = record["rows"][-1]["weights"]["ema"]
    # The less noise there is, the more of it an error of the image takes for noise.
    assert np.isfinite(measured["fd"]) and measured["mse"] == sorted(measured["mse"], reverse=True)


def test_another_seed_is_another_run_with_the_same_evaluation(rehearsal):
    _, records, noise = rehearsal
    one, other = records[MADE[0]], records[OTHER]
    assert one["evaluation"] == other["evaluation"]
    for name in ("initial_weights", "data_digest"):
        assert one[name] != other[name], name
    assert (np.array(noise[MADE[0]]) != np.array(noise[OTHER])).any(axis=(1, 2, 3, 4)).all()


def test_all_sides_evaluate_as_often(rehearsal):
    _, records, _ = rehearsal
    for piece, record in records.items():
        assert [row["step"] for row in record["rows"]] == [2, 4, 6]
        assert [row["images_trained_on"] for row in record["rows"]] == [64, 128, 192]
        assert record["evaluation"]["network_evaluations"] == SCALE.num_images * SCALE.sampler_steps
        assert [len(row["weights"]) for row in record["rows"]] == [1, 1, 3]
        # What measuring gradients costs is counted.
        assert {row["probes"] for row in record["rows"]} == {1 if piece.strategy == "gradient_noise" else 0}


def without_times(record):
    rows = [{name: value for name, value in row.items() if name != "train_seconds"} for row in record["rows"]]
    return {name: value for name, value in record.items() if name not in ("train_seconds", "sessions")} | {"rows": rows}


def test_a_stopped_run_goes_on_to_the_same_numbers(rehearsal, tmp_path):
    root, records, _ = rehearsal
    piece, images = MADE[0], open_set("digits")
    judge, out = Judge(images, root / "out" / "judge_digits.npz", SCALE.num_images), tmp_path / "out.json"
    for last in (1, 3, 4, 99):
        run = Run(piece, images, judge, tmp_path / "work")
        run.advance(lambda step, last=last: step == last, out)
        assert run.step == min(last, SCALE.num_steps)
    found = json.loads(out.read_text())
    assert [session["from_step"] for session in found["sessions"]] == [0, 1, 3, 4]
    assert without_times(found) == without_times(records[piece])


def test_what_is_complete_is_not_made_again(rehearsal):
    root, _, _ = rehearsal
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    with signals_kept():
        assert fill([*MADE, OTHER], root / "out", root / "work", 600) == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_without_time_nothing_is_begun(tmp_path):
    with signals_kept():
        assert fill(MADE, tmp_path / "out", tmp_path / "work", 0) == len(MADE)
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_is_not_measured(rehearsal, tmp_path):
    _, records, _ = rehearsal
    page = report.page(records, "rehearsal", tmp_path)
    assert f"5 of {len(pieces('rehearsal'))} runs are made" in page
    assert "| `speedit` | `uniform` | 1 of 2 |" in page
    assert "`speedit` on digits: not measured yet; 1 runs are missing." in page, "one of two seeds is no verdict"
    assert "`laplace`" in page.partition("Not measured yet: ")[2].splitlines()[0]
    assert (tmp_path / "speedup_rehearsal_digits.png").exists()
    assert "`dig` against `uniform` on digits: not measured yet." in report.backbone_page(records, "rehearsal", tmp_path)
    both = {Piece("rehearsal", "digits", name, seed): records[MADE[0]] for name in FIRST for seed in (0, 1)}
    line = report.verdict(both, "rehearsal", "digits", "speedit")
    assert "not shown: seeds differ more than strategies. Speed-up to uniform's final quality: 1.00 (1.00 to 1.00)" in line
    assert line.endswith("published: 3.3. That of uniform with other learning rates: not measured yet.")
    begun = {piece: record | {"complete": False} for piece, record in records.items()}
    page = report.page(begun, "rehearsal", tmp_path)
    assert "| `speedit` |" not in page and "- `digits_speedit_seed0`: step 6 of 6" in page


def test_another_prediction_is_compared_with_both_baselines(rehearsal):
    _, records, _ = rehearsal
    of_v = Piece("rehearsal", "digits", "uniform_v", 0)
    lines = report.speed_table(records | {of_v: records[MADE[0]]}, "rehearsal", "digits", report.COMPARED)
    for baseline in ("uniform", "uniform_v"):
        assert any(line.startswith(f"| `logit_normal_v` | `{baseline}` | 1 of 1 |") for line in lines), baseline
    ours = {Piece("rehearsal", "digits", name, 0): records[MADE[0]] for name in ("uniform", "uniform_v", "speedit_v")}
    assert "final quality of `uniform` 1.00, of `uniform_v` 1.00." in report.confirmed(ours, "digits")
    assert report.confirmed(records, "digits").endswith("to be faster: not measured yet.")


def test_the_page_of_attempts_has_the_best_one_first(rehearsal, tmp_path):
    _, records, _ = rehearsal
    attempts = {"speedit": records[MADE[1]], "v": records[MADE[0]], "k_20": records[MADE[2]]}
    page = report.tuning_page({Piece("tuning", "fashion", name, 10): of for name, of in attempts.items()}, "tuning", tmp_path)
    found = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert found == sorted(attempts, key=lambda name: attempts[name]["rows"][-1]["weights"]["ema"]["fd"])
    assert f"3 of {len(pieces('tuning'))} runs are made" in page and (tmp_path / "speedup_tuning.png").exists()
    assert report.tuning_page({}, "tuning", tmp_path / "none").startswith("# Is another setting faster")


def test_the_page_of_methods_compares_at_equal_flops(rehearsal, tmp_path):
    _, records, _ = rehearsal
    plain, route = Piece("cpu", "fashion", "uniform", 0), Piece("methods", "fashion", "uniform_route", 0)
    both = {route: records[MADE[1]], plain: records[MADE[0]]}
    page = report.methods_page(both, "methods", tmp_path)
    (row,) = (line for line in page.splitlines() if line.startswith("| `uniform_route` | `uniform` | 0.74 |"))
    assert row.endswith(" 1 of 3 seeds |") and (tmp_path / "speedup_methods.png").exists()
    assert f"1 of {len(pieces('methods'))} runs are made" in page and "`speedit_route`, `sprint`" in page
    assert report.methods_page({}, "methods", tmp_path / "none").startswith("# Do other methods pay?")


@pytest.mark.parametrize(("strategy", "kind"), [("uniform_route", "sparse"), ("sprint_all_tokens", "path-drop")])
def test_runs_are_drawn_again_with_the_guidance_of_their_method(strategy, kind):
    config = make_config(Piece("methods", "fashion", strategy, 0))
    ways = resample.samplings("guidance", config)
    assert list(ways) == ["unguided", *(f"{of}, {w}" for of in ("null label", kind) for w in (1.5, 2.0, 3.0))]
    config.sampling.update(ways[f"{kind}, 2.0"])
    parts = assemble(config, Description((32, 32, 1), tuple("0123456789")), make_mesh(config.mesh, jax.devices()[:1]))
    make_sampler(parts.model, parts.diffusion, Settings.from_config(config.sampling, parts.model), parts.mesh)  # traces it


def test_the_page_of_samplings_has_a_column_for_each():
    of = {"fd": 1.25, "kid": 2.0, "accuracy": 0.5}
    text = resample.page("guidance", "methods", {"fashion_a_seed0": {"unguided": of}, "fashion_b_c_seed1": {"sparse, 2.0": of}})
    assert "--scale=methods --seeds 0 1 --strategies a b_c\n" in text
    assert "|  | unguided | sparse, 2.0 |" in text
    assert "| `fashion_b_c_seed1` |  | 1.25, 0.500 |" in text


def test_pictures_have_a_named_row_of_each_class_for_each_run():
    made = pictures.figure({"cpu/a": np.zeros((20, 8, 8, 1), np.uint8), "methods/b": np.zeros((20, 8, 8, 1), np.uint8)})
    assert [axes.get_title(loc="left") for axes in made.axes] == ["cpu/a", "methods/b"]
    height, width = made.axes[0].images[0].get_array().shape
    assert width > 10 * 8 > 2 * height > 4 * 8


def test_runs_that_were_measured_otherwise_do_not_mix(rehearsal, tmp_path):
    _, records, _ = rehearsal
    (tmp_path / "rehearsal").mkdir()
    for piece, record in records.items():
        judge = record["judge"] | ({"weights": "another"} if piece == OTHER else {})
        (tmp_path / "rehearsal" / f"{piece.name}.json").write_text(json.dumps(record | {"judge": judge}))
    with pytest.raises(UserError, match=rf"{OTHER.name}\.json was not measured as the others"):
        analysis.read(tmp_path, "rehearsal")


def test_the_plan():
    for scale in SCALES.keys() - {"tuning", "methods", "cpu256"}:
        of = pieces(scale)
        assert len(set(of)) == len(of) and {p.seed for p in of}.isdisjoint(p.seed for p in pieces("tuning"))
        assert [(p.strategy, p.seed) for p in of[:4]] == [*((name, 0) for name in FIRST), (FIRST[0], 1)]
        assert {p.strategy for p in of} == STRATEGIES.keys()
    emoji = [p.strategy for p in pieces("cpu") if p.set == "emoji"]
    assert {*emoji} == {*ON_EMOJI} and {PAIRS.get(name, "uniform") for name in emoji} < {*emoji}
    assert [(p.strategy, p.seed) for p in pieces("cpu256")] == [("uniform", 0), ("dig", 0), ("uniform", 1), ("dig", 1)]
    cpu = {name: make_config(Piece("cpu", "fashion", name, 0)) for name in STRATEGIES | ATTEMPTS}
    assert all(cpu[name] != cpu["speedit"] for name in ATTEMPTS)
    assert set(WITHOUT) | set(PHASES) == {p.strategy for p in pieces("methods")}
    for name, plain in WITHOUT.items():
        method = make_config(Piece("methods", "fashion", name, 0)).to_dict()
        assert method != cpu[plain].to_dict()
        assert method | {of: cpu[plain][of].to_dict() for of in ("tokens", "regularizer")} == cpu[plain].to_dict(), name
    for names in RATES.values():
        of_rates = [make_config(Piece("tuning", "fashion", name, 10)) for name in names]
        assert [of.optim.learning_rate for of in of_rates] == [1e-3, 2e-3, 4e-3]
        for of in of_rates[1:]:
            of.optim.learning_rate = 1e-3
            assert of.to_dict() == of_rates[0].to_dict()
    assert cpu["uniform_lr_half"].optim.learning_rate * 4 == cpu["uniform_lr_double"].optim.learning_rate == 2e-3
    assert (cpu["dig"].model.name, cpu["dig"].model.width) == ("DiG-S/4", 112)
    assert cpu["uniform"].timesteps.strategy == "uniform" and cpu["logit_normal_v"].diffusion.prediction == "v"
    assert (cpu["flow_x0_patch16"].model.name, cpu["flow_x0_patch16"].diffusion.prediction) == ("DiT-S/16", "x0")
    flows = [cpu[name].to_dict() for name in ("flow_v", "flow_x0")]
    flows[1]["diffusion"]["prediction"] = "epsilon"
    assert flows[0] == flows[1] and flows[0]["sampling"]["num_steps"] * 2 == cpu["uniform"].sampling.num_steps


@pytest.mark.parametrize("scale", ["cpu", "cpu256", "gpu", "gpu256"])
def test_dig_and_dit_have_as_many_parameters(scale):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    data = Description((32, 32, 1), tuple("0123456789"))
    counts = []
    for name in ("uniform", "dig"):
        shapes = assemble(make_config(Piece(scale, "fashion", name, 0)), data, mesh).shapes.params
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_the_judge_knows_better_from_worse(rehearsal):
    root, _, _ = rehearsal
    images = open_set("digits")
    judge = Judge(images, root / "out" / "judge_digits.npz", 100)
    assert judge.identity["accuracy"] > 0.9
    x, y, rng = images.held_out.images[:200], images.held_out.labels[:200], np.random.default_rng(0)
    noisy = [x + noise * rng.standard_normal(x.shape, dtype=np.float32) for noise in (0, 0.3, 1)]
    scores = [judge.score(image, y) for image in noisy]
    for name in ("fd", "kid"):
        values = [score[name] for score in scores]
        assert values == sorted(values) and values[2] > 2 * values[0], name
    assert scores[0]["accuracy"] > scores[2]["accuracy"]
    assert judge.score(x, (y + 1) % 10)["accuracy"] < 0.1
    panel = Panel(judge, images, 100)
    assert panel.floor["judge"] == judge.identity["floor"]["fd"]
    seen = [panel.score(image, y) for image in noisy]
    assert [of["judge"] for of in seen] == [score["fd"] for score in scores]
    for name in ("8 x 8 pixels", "untrained network"):
        values = [of[name] for of in seen]
        assert values == sorted(values) and values[2] > 2 * values[0], name


def test_fashion_mnist_is_padded(tmp_path):
    rng = np.random.default_rng(0)
    raw = {}
    for part, n in (("train", 7), ("t10k", 3)):
        raw[part] = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8)
    for part, (images, labels) in raw.items():
        for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes()))
    found = open_set("fashion", fashion=tmp_path)
    assert found.train.image_shape == (32, 32, 1) and (len(found.train), len(found.held_out)) == (7, 3)
    np.testing.assert_allclose((found.train.images[:, 2:30, 2:30, 0] + 1) * 127.5, raw["train"][0], atol=1e-4)
    np.testing.assert_array_equal(found.held_out.labels, raw["t10k"][1])
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert (found.train.images[:, border] == -1).all()
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        open_set("fashion", fashion=tmp_path / "nowhere")


def test_emoji_are_read_from_the_package(tmp_path):
    records = [{"image": f"{i:02}.png", "category": "AB"[i % 2], "has_img_google": True} for i in range(20)]
    records += [
        {"image": "tone.png", "category": "Component", "has_img_google": True},
        {"image": "none.png", "category": "A", "has_img_google": False},
    ]
    files = {"package/emoji.json": json.dumps(records[::-1]).encode()}
    for i in range(20):
        picture = Image.new("RGBA", (64, 64), (10 * i, 0, 0, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 64, 32))  # transparent above: white
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files[f"package/img/google/64/{i:02}.png"] = buffer.getvalue()
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = open_set("emoji", emoji=tmp_path / "emoji.tgz")
    assert found.train.class_names == ("A", "B") and found.train.image_shape == (32, 32, 3)
    # Every fifth of either category, in the order of their names.
    red = lambda source: np.round((source.images[:, 31, 0, 0] + 1) * 12.75).astype(int).tolist()  # noqa: E731
    assert red(found.held_out) == [8, 9, 18, 19] and len(found.train) == 16
    np.testing.assert_array_equal(found.held_out.labels, [0, 1, 0, 1])
    assert (found.train.images[:, :16] == 1).all()
    with pytest.raises(UserError, match="npm pack emoji-datasource-google"):
        open_set("emoji")
