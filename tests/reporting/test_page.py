"""The page of a run: what it holds, what it does not let in, and what a browser makes of it."""

import json
import os
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from browser import open_page
from errors import assert_one_line

import speedit_jax
from speedit_jax.data.sources import open_source
from speedit_jax.reporting.curves import read_metrics
from speedit_jax.reporting.environment import Environment
from speedit_jax.reporting.markup import byte_size, duration, table, tag
from speedit_jax.reporting.page import write_report
from speedit_jax.reporting.panels import draw, panels_of, smoothed, thin
from speedit_jax.sampling.images import write_png
from speedit_jax.sharding import make_mesh
from speedit_jax.training import run

HOSTILE = '<script>throw "in"</script><img src=x onerror=throw>"\'&$title'
STEPS = 200


def meta_of(**changes):
    config = tiny.make_config(training__num_steps=2 * STEPS, **changes)
    source = open_source(config.data)
    return run.describe(config, source, source.image_shape, None)


def write_metrics(workdir, steps, tail=""):
    random = np.random.default_rng(0)
    lines = []
    for step in steps:
        record = {"step": step, "loss": 1 / step + random.random() / 50, "learning_rate": 1e-4, "param_norm": 5.0, "skipped": 0.0}
        record |= {f"mse_q{i}": random.random() / i for i in (1, 2, 3, 4)} if step > 1 else {}
        record |= {"time_per_step": 0.5, "time_images_per_second": 32.0, "time_total": 0.6 * step, "time_goodput": 0.8}
        record |= {"eval_fid": 100 / step, "eval_<b>kid": 0.5, "eval_precision": 0.0} if step % 50 == 0 else {}
        lines.append(json.dumps(record) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines) + tail)


def add_checkpoint(workdir, step, meta):
    """As much of one as the page looks at; test_checkpoint.py holds `peek` to what orbax writes."""
    path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with all there is, whose names are hostile."""
    workdir = tmp_path_factory.mktemp("report") / "a <b> & 'run'"
    meta = meta_of(optim__learning_rate=3e-4) | {"class_names": [HOSTILE, "kätzchen", "</style>"]}
    run.claim(workdir, meta)
    write_metrics(workdir, range(1, STEPS + 1))
    add_checkpoint(workdir, 150, meta)
    environment = Environment(workdir, make_mesh({"data": -1, "fsdp": 1, "tensor": 1}), 0, parameters=12345)
    environment.write(150)
    random = np.random.default_rng(0)
    for step in range(10, STEPS + 1, 10):
        write_png(workdir / "samples" / f"step_{step:07d}.png", random.integers(0, 256, (30, 40, 3)).astype(np.uint8))
    write_png(workdir / "samples" / "step_0000200.png", random.integers(0, 256, (1500, 1200, 3)).astype(np.uint8))
    write_png(workdir / "new.png", random.integers(0, 256, (30, 40, 3)).astype(np.uint8))
    sampled = {"checkpoint_step": 150, "weights": "ema", "num_images": 64, "sampler": HOSTILE, "num_steps": 50, "eta": 0.25}
    (workdir / "new.json").write_text(json.dumps(sampled))
    evaluated = {"images": {"from": "new.npz", "n": 64}, "reference": {"from": "digits", "n": 1442}, "features": "pixels"}
    (workdir / "sub").mkdir()
    (workdir / "sub" / "e.json").write_text(json.dumps(evaluated | {"metrics": {"fid": 12.3456, "kid": 0.125}}))
    bits = {"images": {"from": "digits", "split": "held_out", "n": 71, "of": 355}, "checkpoint_step": 150}
    (workdir / "bits.json").write_text(json.dumps(bits | {"total_bpd": 6.5, "standard_error": 0.05}))
    (workdir / "begun.partial").mkdir()
    (workdir / "begun.partial" / "settings.json").write_text(json.dumps(sampled))
    (workdir / "other.json").write_text("[1, 2]")
    (workdir / "gone.json").symlink_to("nowhere")
    (workdir / "broken.json").write_text('{"metrics": {')
    return workdir


@pytest.fixture(scope="module")
def page(workdir, tmp_path_factory):
    return write_report(workdir, tmp_path_factory.mktemp("page") / "page.html")


VOID = {"meta", "img", "input", "link", "br"}


class Reader(HTMLParser):
    """The elements with their attributes and texts; elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self._open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, name, class_=None):
        return [a for element, a in self.elements if element == name and (not class_ or class_ in (a.get("class") or "").split())]


@pytest.fixture(scope="module")
def read(page):
    return Reader(page.read_text(encoding="utf-8"))


def test_nothing_is_loaded_and_nothing_gets_in(page, read):
    assert len(read.all("script")) == 1 and "src" not in read.all("script")[0]
    assert not {"link", "iframe", "object", "base", "form"} & {name for name, _ in read.elements}
    for name, attributes in read.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "srcset", "poster"):
                assert value.startswith(("data:image/", "#")), (name, value)
    assert not re.search(r"url\((?!#)|@import", page.read_text(encoding="utf-8"))
    for text in (HOSTILE, "kätzchen", "</style>", "a <b> & 'run'", "eval <b>kid"):
        assert text in read.text
    identifiers = [a["id"] for _, a in read.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))


def test_what_the_page_says(read):
    said = [
        "not complete step 200 of 400 2 min of training left at this pace newest checkpoint: step 150",
        "python -m speedit_jax.train",
        "goodput 80.0%",
        "parameters 12,345",
        "eval fid 0.5",
        "speedit: T=1000",
        "12 of 20 grids are shown",
        "learning_rate 0.0003 default 0.0001",
        "sub/e.json new.npz 64 digits 1442 pixels 12.35 0.125",
        "eval precision 0 ",
        "bits.json digits held_out 71 150 6.5 0.05",
        "new.json 150 ema 64",
        "eta 0.25",
        "8 x cpu",
        "data 8 x fsdp 1 x tensor 1",
    ]
    for words in said:
        assert words in read.text, words
    for name in ("other.json", "broken.json", "begun.partial"):
        assert name not in read.text
    assert "bits.json 150" not in read.text, "no images were drawn"


def test_only_what_differs_from_the_defaults_is_marked(page):
    changed = re.findall(r'<tr class="changed"><td>(\w+)</td>', page.read_text(encoding="utf-8"))
    assert sorted(changed) == sorted([name.split(".")[1] for name in tiny.TINY] + ["learning_rate"])


def test_grids_are_evenly_chosen_and_large_ones_reduced(read):
    pictures = [a for a in read.all("img") if a["alt"].startswith("grid")]
    steps = [int(a["alt"].split()[-1]) for a in pictures]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (10, 200) and max(np.diff(steps)) <= 20
    kinds = [a["src"].split(";")[0] for a in pictures]
    assert kinds == ["data:image/png"] * 11 + ["data:image/jpeg"]
    assert [a["max"] for a in read.all("input")] == ["11"]


def test_every_metric_is_a_curve_with_its_numbers(read, workdir):
    metrics = read_metrics(workdir)
    panels = list(panels_of(metrics))
    assert sorted(name for panel in panels for name in panel.names) == sorted(metrics)
    hovers = [json.loads(a["data-hover"]) for a in read.all("figure", "panel")]
    assert len(hovers) == len(panels)
    for panel, hover in zip(panels, hovers, strict=True):
        for name, points in zip(panel.names, hover["series"], strict=True):
            steps, values = metrics[name]
            assert [step for step, _ in points] == steps.tolist()
            np.testing.assert_allclose([value for _, value in points], values, rtol=6e-4)


def test_curves_are_where_the_pointer_looks_for_them(workdir):
    """The diagram's own coordinates against the box and the limits by which the script finds a step."""
    metrics = read_metrics(workdir)
    panel = next(panel for panel in panels_of(metrics) if "eval_fid" in panel.names)
    text = draw(panel, metrics)
    hover = json.loads(Reader(text).all("figure")[0]["data-hover"])
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    dots = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)" y="[\d.]+" style="fill: #3b82f6', text)]
    (left, right), (low, high) = hover["box"], hover["limits"]
    expected = [width * (left + (step - low) / (high - low) * (right - left)) for step in (50, 100, 150, 200)]
    np.testing.assert_allclose(dots, expected, atol=0.01)


def test_long_runs_are_thinned_and_keep_their_extremes(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(size=100_000)
    values[[123, 70_000]] = 50, -60
    kept = thin(values)
    assert len(kept) <= 602 and (np.diff(kept) > 0).all()
    assert {0, 123, 70_000, 99_999} <= set(kept.tolist())
    np.testing.assert_array_equal(thin(values[:600]), np.arange(600))
    run.claim(tmp_path, meta_of())
    names = ("loss", "mse", "vb", *(f"{name}_q{i}" for name in ("mse", "loss") for i in (1, 2, 3, 4)))
    lines = (json.dumps({"step": step} | dict.fromkeys(names, round(float(x), 9))) for step, x in enumerate(values[:5_000]))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert write_report(tmp_path).stat().st_size < 700_000


def test_the_mean_is_that_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=600)
    expected = [values[max(0, i - 10) : i + 11].mean() for i in range(600)]
    np.testing.assert_allclose(smoothed(values), expected, atol=1e-12)


def test_values_that_are_not_finite_are_counted(tmp_path):
    run.claim(tmp_path, meta_of())
    lines = ['{"step": 1, "loss": null}', '{"step": 2, "loss": 0.5, "mse": Infinity}']  # as earlier versions wrote it
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = Reader(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "loss 0.5 1 not finite, not drawn" in text and "Mean squared error 1 not finite" in text


def test_paths_of_any_bytes(tmp_path):
    meta = meta_of()
    meta["config"]["data"]["source"] = f"folder:{os.fsdecode(b'/caf' + bytes([0xE9]))}"
    run.claim(tmp_path, meta)
    assert r"folder:/caf\xe9" in Reader(write_report(tmp_path).read_text(encoding="utf-8")).text


BROKEN = ["", '{"step": 3, "lo', "\0" * 20, "[1]\n", '{"loss": 1.0}\n', '{"step": "x"}\n']


@pytest.mark.parametrize("tail", BROKEN, ids=["nothing", "half a line", "zeros", "no object", "no step", "a strange step"])
def test_lines_that_cannot_be_read_are_passed_over(tmp_path, tail):
    write_metrics(tmp_path, (1, 2), tail)
    assert read_metrics(tmp_path)["loss"][0].tolist() == [1, 2]


def test_a_run_that_has_only_begun(tmp_path):
    run.claim(tmp_path, meta_of())
    (tmp_path / "environment.json").write_text("[{")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_0000010.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert write_report(tmp_path) == tmp_path / "report.html"
    text = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for words in ("step 0 of 400", "no checkpoint yet", "Nothing is logged yet", "No grid is drawn yet", "start it again"):
        assert words in text
    assert not list(tmp_path.glob("*.partial"))


def test_the_checkpoint_knows_how_long_the_run_is(tmp_path):
    """run.json is as old as the run, which may have been prolonged."""
    meta = meta_of()
    run.claim(tmp_path, meta)
    meta["config"]["training"]["num_steps"] = 300
    add_checkpoint(tmp_path, 100, meta)
    add_checkpoint(tmp_path, 300, meta)
    assert "complete step 300 of 300" in Reader(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_run_that_is_prolonged_is_not_complete(tmp_path):
    """Before its first checkpoint since."""
    meta = meta_of()
    run.claim(tmp_path, meta)
    add_checkpoint(tmp_path, 400, meta)
    Environment(tmp_path, make_mesh({"data": -1, "fsdp": 1, "tensor": 1}), 400, num_steps=1000)
    write_metrics(tmp_path, (400, 450))
    text = Reader(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "not complete step 450 of 1,000" in text and "newest checkpoint: step 400" in text


def test_what_is_no_run_is_one_line(tmp_path):
    assert_one_line(lambda: write_report(tmp_path / "x"), str(tmp_path / "x"), "no run.json")
    for text, words in {
        "{": "cannot be read",
        "[]": "cannot be read",
        "{}": "does not belong to a training run",
        '{"imported_from": "a.pt"}': "a.pt",
    }.items():
        (tmp_path / "run.json").write_text(text)
        assert_one_line(lambda: write_report(tmp_path), str(tmp_path), words)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_markup_escapes_whatever_is_no_markup():
    assert (
        tag("p", "<b>", tag("i", '"'), class_='"x', title=None, hidden=True)
        == '<p class="&quot;x" hidden>&lt;b&gt;<i>&quot;</i></p>'
    )
    assert table(["a", "b"], [["<", 0.123456], [None, 12]]).count('class="number"') == 3
    assert [byte_size(n) for n in (None, 1000, 1536, 3 * 2**30)] == [None, "1e+03 B", "1.5 KiB", "3 GiB"]
    assert [duration(s) for s in (0.5, 61, 4000, 200_000)] == ["0.5 s", "1 min", "1 h 7 min", "2 d 7 h"]


LOOK = """
const images = [...document.images], panel = document.querySelector(".panel"), plot = panel.querySelector(".plot");
const numbers = () => [...panel.querySelectorAll("b, output")].map((e) => e.textContent).join(" ");
const area = plot.getBoundingClientRect(), before = numbers(), slider = document.querySelector(".grids input");
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: area.left + area.width * 0.13, clientY: area.top + 9 }));
const pointed = numbers();
plot.dispatchEvent(new PointerEvent("pointerleave"));
const shown = () => [...document.querySelectorAll(".grids figure")].filter((f) => f.offsetParent).map((f) => f.textContent);
const last = shown();
slider.value = 0;
slider.dispatchEvent(new Event("input"));
const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll table, svg"));
return {
  images: images.length, decoded: images.filter((image) => image.naturalWidth > 0).length,
  diagrams: [...document.querySelectorAll(".plot svg")].filter((svg) => svg.getBoundingClientRect().height > 80).length,
  before, pointed, after: numbers(), last, first: shown(), width: innerWidth, text: document.body.innerText,
  overflow: wide.filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80)),
};
"""


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(page, read, width):
    seen = open_page(page, LOOK, width)
    assert seen["problems"] == seen["requested"] == seen["console"] == []
    result = seen["result"]
    assert result["width"] == width
    assert result["images"] == result["decoded"] == len(read.all("img")) == 13
    assert result["diagrams"] == len(read.all("figure", "panel"))
    assert (result["last"], result["first"]) == (["step 200"], ["step 10"])
    # The first diagram is that of eval_fid, of values at 50, 100, 150 and 200.
    assert (result["before"], result["pointed"], result["after"]) == ("0.5 ", "2 step 50", "0.5 ")
    assert HOSTILE in result["text"] and result["overflow"] == []


def test_the_template_is_shipped():
    """By a plain `pip install`, too, which takes only what pyproject.toml names."""
    root = Path(speedit_jax.__file__).parent
    shipped = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    listed = {path for pattern in shipped["*"] for path in root.rglob(pattern)}
    assert listed == {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
