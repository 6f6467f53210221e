"""report.html: a whole run on one page, without other files or a network."""

import contextlib
import datetime
import importlib.resources
import io
import json
import string
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from speedit_jax import storage
from speedit_jax.config import complete, flatten, get_config
from speedit_jax.errors import UserError
from speedit_jax.reporting import panels
from speedit_jax.reporting.curves import read_metrics
from speedit_jax.reporting.environment import NAME as ENVIRONMENT
from speedit_jax.reporting.environment import read_environment
from speedit_jax.reporting.markup import Html, byte_size, duration, image, join, pairs, table, tag
from speedit_jax.training import assembly, changes, run
from speedit_jax.training.checkpoint import peek

PROMPTS = "prompts.json"  # beside the grids of a run on text
_GRIDS = 12  # shown at most, evenly chosen
_RESULTS = 12  # files of each kind of result shown at most, the newest
_SIDE = 1024  # pixels to which larger pictures are reduced
_LARGE = 200_000  # bytes from which a picture is reduced and compressed
_HUGE = 64_000_000  # pixels from which it is left out: it would have to be decoded


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Writes the page of the run in `workdir`, however far it has come, to `out` or to WORKDIR/report.html.

    Raises:
      UserError: the directory holds no run.
    """
    out = out or workdir / "report.html"
    storage.write_text(out, page(workdir))
    return out


def page(workdir: Path) -> str:
    saved = read_run(workdir)
    newest = peek(workdir)
    step, meta = newest or (None, saved)
    config = complete(meta["config"])
    metrics = read_metrics(workdir)
    sessions = read_environment(workdir)
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    values = {
        "title": f"{storage.resolved(workdir).name}: {config.model.name}",
        "status": status(config, step, metrics, sessions),
        "key_numbers": key_numbers(metrics, sessions),
        "curves": curves(metrics),
        "grids": grids(workdir / "samples", fills=config.data.mask != "" and (config.data.vae or not meta.get("latents"))),
        "results": results(workdir),
        "settings": settings(config),
        "environment": environment(sessions),
        "identity": identity(workdir, meta, config),
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
    return string.Template(template).substitute({name: join([value]) for name, value in values.items()})


def read_run(workdir: Path) -> dict[str, Any]:
    """What run.json holds.

    Raises:
      UserError: there is none, or it is not that of a run.
    """
    path = workdir / "run.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training run (no run.json); give the --workdir of a training run")
    try:
        meta = run.read_run(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); run train again: it writes it from a checkpoint's copy") from e
    if "imported_from" in meta:
        raise UserError(
            f"{workdir} holds weights imported from {meta['imported_from']}, not a training run; choose another --workdir"
        )
    if not isinstance(meta.get("config"), dict) or "data_fingerprint" not in meta:
        raise UserError(f"{path} does not belong to a training run; choose another --workdir")
    return meta


def status(config: ml_collections.ConfigDict, step: int | None, metrics: panels.Metrics, sessions: list[dict[str, Any]]) -> Html:
    """The run's progress, and how to resume it."""
    newest = sessions[-1] if sessions else {}
    # A run that is prolonged says so before it saves.
    of = session if isinstance(session := newest.get("num_steps"), int) else config.training.num_steps
    logged = max((int(steps[-1]) for steps, _ in metrics.values()), default=0)
    done = max(step or 0, logged)
    complete = (step or 0) >= of
    parts = [
        tag("span", "complete" if complete else "not complete", class_="badge good" if complete else "badge"),
        tag("strong", f"step {done:,} of {of:,}"),
    ]
    if not complete:
        left = last(metrics, "time_per_step")
        parts.append(f"{duration(left * (of - done))} of training left at this pace" if left and done < of else "")
    parts.append("no checkpoint yet" if step is None else f"newest checkpoint: step {step:,}")
    line = tag("p", join(tag("span", part) for part in parts if part), class_="status")
    bar = tag("progress", value=done, max=max(of, 1))
    if complete:
        return join([line, bar])
    command = newest.get("command")
    how = f"If it is not running, {'the same command resumes from the checkpoint' if step else 'start it again'}"
    return join([line, bar, tag("p", how, ":" if command else "."), tag("pre", command) if command else ""])


def last(metrics: panels.Metrics, name: str, share: float = 0.0) -> float | None:
    """The newest value of a metric, or the median of the newest `share` of them; None where there is no finite one."""
    values = metrics[name][1] if name in metrics else np.array([])
    values = values[np.isfinite(values)]
    return float(np.median(values[-max(1, int(share * len(values))) :])) if len(values) else None


def key_numbers(metrics: panels.Metrics, sessions: list[dict[str, Any]]) -> Html:
    newest = sessions[-1] if sessions else {}
    total, goodput, mfu = (last(metrics, f"time_{name}") for name in ("total", "goodput", "mfu"))
    skipped = last(metrics, "skipped")
    found = [(name.replace("_", " "), last(metrics, name)) for name in metrics if panels.is_evaluation(name)]
    found += [
        ("loss", last(metrics, "loss", 0.05)),
        ("mean squared error", last(metrics, "mse", 0.05)),
        ("images a second", last(metrics, "time_images_per_second", 0.5)),
        ("seconds a step", last(metrics, "time_per_step", 0.5)),
        ("model FLOPs utilisation", mfu and f"{mfu:.1%}"),
        ("goodput", goodput and f"{goodput:.1%}"),
        ("time spent", total and duration(total)),
        ("skipped steps", None if skipped is None else f"{skipped:.0f}"),
        ("parameters", newest.get("parameters") and f"{newest['parameters']:,}"),
        ("device memory, peak", byte_size(newest.get("device_peak_bytes"))),
        ("host memory, peak", byte_size(newest.get("host_peak_bytes"))),
    ]
    return tag("section", pairs((name, value) for name, value in found if value is not None), class_="key")


def curves(metrics: panels.Metrics) -> Html:
    drawn = [panels.draw(panel, metrics) for panel in panels.panels_of(metrics)]
    return tag("div", *drawn, class_="panels") if drawn else tag("p", "Nothing is logged yet.", class_="none")


def grids(directory: Path, fills: bool) -> Html:
    """The grids of training, all or evenly chosen ones; the page shows one at a time.

    Args:
      fills: they are of a run with data.mask.
    """
    paths = sorted(directory.glob("step_*.png"))
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(_GRIDS, len(paths))).round().astype(int))]
    figures = []
    for path in chosen:
        step = path.stem.removeprefix("step_")
        step = f"step {int(step):,}" if step.isdecimal() else step
        if picture := embedded(path, f"grid of samples, {step}"):
            figures.append(tag("figure", picture, tag("figcaption", step)))
    if not figures:
        return tag("p", "No grid is drawn yet.", class_="none")
    slider = tag(
        "input", type="range", min=0, max=len(figures) - 1, value=len(figures) - 1, step=1, aria_label="step of the grid"
    )
    left_out = f" {len(figures)} of {len(paths)} grids are shown." if len(paths) > len(figures) else ""
    pairs = " In pairs: an example with a part hidden, and filled." if fills else ""
    note = tag("p", "Of the EMA weights, always from the same noise." + pairs + left_out, class_="note")
    return join([note, prompts(directory), tag("div", slider if len(figures) > 1 else "", *figures, class_="grids")])


def prompts(directory: Path) -> Html:
    """Of a run on text, what the columns of its grids are drawn of."""
    with contextlib.suppress(OSError, ValueError):
        texts = json.loads((directory / PROMPTS).read_text())
        return join([tag("p", "Prompts, by column:", class_="note"), tag("ol", *(tag("li", text) for text in texts))])
    return join([])


def embedded(path: Path, alt: str) -> Html | None:
    """A picture, reduced where it is large; None where it cannot be read or is huge."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > _HUGE:
                return None
            picture.load()
            if len(data) <= _LARGE:
                return image(data, "png", alt)
            picture = picture.convert("RGB")
            picture.thumbnail((_SIDE, _SIDE))
            smaller = io.BytesIO()
            picture.save(smaller, "JPEG", quality=88)
            return image(smaller.getvalue(), "jpeg", alt)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow raises SyntaxError for a broken PNG
        return None


def results(workdir: Path) -> Html:
    """What sample, evaluate and likelihood left in the workdir: their settings, pictures and numbers."""
    apart = {workdir / name for name in ("checkpoints", "tensorboard", "samples")} | {workdir / "run.json", workdir / ENVIRONMENT}
    paths = [path for path in (*workdir.glob("*.json"), *workdir.glob("*/*.json")) if not {path, path.parent} & apart]
    sampled, evaluated, measured = [], [], []
    for path in sorted((path for path in paths if path.is_file()), key=lambda path: (-storage.modified(path), path)):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            record = json.loads(path.read_text())
            if isinstance(record.get("metrics"), dict):
                evaluated.append((path.relative_to(workdir), record))
            elif "total_bpd" in record:
                measured.append((path.relative_to(workdir), record))
            # The settings of a drawing that goes on lie in OUT.partial.
            elif "checkpoint_step" in record and path.parent.suffix != ".partial":
                sampled.append((path.relative_to(workdir), record))
    parts = []
    for title, found, show in (
        ("Evaluated", evaluated, show_evaluated),
        ("Bits per dimension", measured, show_measured),
        ("Sampled", sampled, lambda f: show_sampled(workdir, f)),
    ):
        if found:
            more = f"The newest {_RESULTS} of {len(found)}." if len(found) > _RESULTS else ""
            parts += [tag("h3", title), tag("p", more, class_="note") if more else "", show(found[:_RESULTS])]
    return join(parts) if parts else tag("p", "Nothing was sampled or evaluated into this directory.", class_="none")


def show_evaluated(found: list[tuple[Path, dict[str, Any]]]) -> Html:
    names = list(dict.fromkeys(name for _, record in found for name in record["metrics"]))
    rows = []
    for path, record in found:
        sides = [side if isinstance(side := record.get(name), dict) else {} for name in ("images", "reference")]
        of = [cell for side in sides for cell in (side.get("from"), side.get("n"))]
        rows.append([str(path), *of, record.get("features"), *(record["metrics"].get(name) for name in names)])
    head = ["file", "images", "n", "reference", "n", "features", *names]
    return join([table(head, rows), *(all_settings(path, record) for path, record in found)])


def show_measured(found: list[tuple[Path, dict[str, Any]]]) -> Html:
    rows = []
    for path, record in found:
        images = images if isinstance(images := record.get("images"), dict) else {}
        cells = (images.get(name) for name in ("from", "split", "n"))
        rows.append([str(path), *cells, *(record.get(name) for name in ("checkpoint_step", "total_bpd", "standard_error"))])
    head = ["file", "images", "split", "n", "checkpoint step", "at most", "standard error"]
    return join([table(head, rows), *(all_settings(path, record) for path, record in found)])


def show_sampled(workdir: Path, found: list[tuple[Path, dict[str, Any]]]) -> Html:
    columns = ("checkpoint_step", "weights", "num_images", "sampler", "num_steps", "guidance_scale", "seed")
    rows = [[str(path), *(record.get(name) for name in columns)] for path, record in found]
    parts = [table(["file", *(name.replace("_", " ") for name in columns)], rows)]
    for path, record in found:
        picture = embedded((workdir / path).with_suffix(".png"), f"images of {path}")
        parts.append(
            tag("figure", picture, tag("figcaption", f"{path.with_suffix('.png')}"), class_="sampled") if picture else ""
        )
        parts.append(all_settings(path, record))
    return join(parts)


def all_settings(path: Path, record: dict[str, Any]) -> Html:
    rows = [(name, short(value)) for name, value in flatten(record).items()]
    return tag("details", tag("summary", f"All of {path}"), table(["setting", "value"], rows, class_="settings"))


def short(value: Any) -> Any:
    """A value that a table has room for."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return '""' if text == "" else value if len(text) <= 200 else f"{text[:200]}…"


def settings(config: ml_collections.ConfigDict) -> Html:
    """The whole config by section, with what the defaults were where they were changed."""
    values = flatten(config.to_dict())
    defaults = flatten(get_config().to_dict())
    sections: dict[str, list[Html]] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        known = name in defaults
        changed = not known or value != defaults[name]
        default = tag("small", "default ", tag("code", short(defaults[name])) if known else "none") if changed else ""
        cells = (tag("td", key), tag("td", tag("code", short(value)), default))
        sections.setdefault(section, []).append(tag("tr", *cells, class_="changed" if changed else None))
    blocks = [tag("div", tag("h3", name or "run"), tag("table", *rows), class_="block") for name, rows in sections.items()]
    return tag("div", *blocks, class_="settings")


def environment(sessions: list[dict[str, Any]]) -> Html:
    """Where the run was trained: the newest process in full, and all in a line each."""
    if not sessions:
        return tag("p", f"This run has no {ENVIRONMENT}.", class_="none")
    newest = sessions[-1]
    versions = newest.get("versions")
    mesh = newest.get("mesh")
    shown = [
        ("devices", f"{newest.get('devices')} x {newest.get('device_kind')}"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.items()) if isinstance(mesh, dict) else None),
        ("processes", newest.get("processes")),
        ("CPUs a process", newest.get("cpus")),
        ("system", newest.get("system")),
        ("Python", newest.get("python")),
        *(versions.items() if isinstance(versions, dict) else ()),
        ("parameters", f"{parameters:,}" if isinstance(parameters := newest.get("parameters"), int) else None),
        ("command", tag("code", newest.get("command"))),
        ("GFLOP a step", newest.get("step_flops") and newest["step_flops"] / 1e9),
    ]
    rows = (
        (
            when(session.get("started")),
            when(session.get("written")),
            session.get("first_step"),
            session.get("last_step"),
            f"{session.get('devices')} x {session.get('device_kind')}",
            byte_size(session.get("device_peak_bytes")),
            byte_size(session.get("device_limit_bytes")),
            byte_size(session.get("host_peak_bytes")),
        )
        for session in sessions
    )
    head = ["started, UTC", "last written", "from step", "to step", "devices", "device memory, peak", "of", "host memory, peak"]
    note = 'Memory is that of the first process and of the fullest of its devices; "-" is what the platform does not tell.'
    return join([pairs(shown), tag("h3", "Each start"), table(head, rows), tag("p", note, class_="note")])


def when(time: Any) -> str | None:
    """2026-11-25T22:41:21+00:00 -> 2026-11-25 22:41."""
    return time[:16].replace("T", " ") if isinstance(time, str) else None


def identity(workdir: Path, meta: dict[str, Any], config: ml_collections.ConfigDict) -> Html:
    try:
        strategy = assembly.make_strategy(config, assembly.make_diffusion(config)).describe(config.training.batch_size)
    except UserError as e:
        strategy = str(e)
    names = meta.get("class_names") or []
    shape, latents, text = meta.get("image_shape"), meta.get("latents"), meta.get("text")
    shown = [
        ("directory", str(storage.resolved(workdir))),
        ("model", config.model.name),
        ("timesteps", strategy),
        ("data", config.data.source),
        ("data fingerprint", meta.get("data_fingerprint")),
        ("draws", " x ".join(map(str, shape)) if isinstance(shape, list) else None),
        ("latents of", latents.get("vae") if isinstance(latents, dict) else None),
        ("text encoder", text["encoder"].get("encoder") if isinstance(text, dict) else None),
        ("classes", None if text else f"{len(names)}" if names else "none, unconditional"),
        *((f"changed at step {step:,}", changes.spelled(changed, len(changed))) for step, changed in changes.recorded(meta)),
        *(meta["versions"].items() if isinstance(meta.get("versions"), dict) else ()),
    ]
    chips = tag("div", *(tag("span", name) for name in names), class_="chips")
    many = tag("details", tag("summary", f"The {len(names)} classes"), chips) if len(names) > 40 else chips
    return join([pairs((name, value) for name, value in shown if value is not None), many if names else ""])
