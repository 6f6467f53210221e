"""The curves of a run's page: vector graphics that take the page's colours, and the numbers that pointing at them shows."""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from speedit_jax.reporting.markup import Html, tag

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]

_COLOURS = ("#3b82f6", "#e07b39", "#2f9e6e", "#a366d8")  # each reads on white and on near black
_INK = "#010203"  # becomes the page's own colour of text
_BOX = (0.12, 0.12, 0.85, 0.84)  # of the axes in a diagram: left, bottom, width, height
_POINTS = 600  # a curve has at most about as many
_SMOOTHED = 50  # and from so many values on a moving mean


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
      names: {metric: what the legend calls it}.
      log: a logarithmic axis, where all values are positive and far enough apart.
      smooth: draw a moving mean, where there are many values.
      marks: show each value as a dot.
      zero: let the axis begin there.
    """

    title: str
    names: dict[str, str]
    log: bool = False
    smooth: bool = True
    marks: bool = False
    zero: bool = False


_QUARTERS = ("q1, least noisy", "q2", "q3", "q4, noisiest")
_FEW = {"log": True, "smooth": False, "marks": True}  # of what is measured now and then
PANELS = (
    Panel("Loss", {"loss": "loss"}, log=True),
    Panel("Mean squared error", {"mse": "mse", "masked_mse": "with masked tokens"}, log=True),
    Panel("Held-out mean squared error", {"heldout_mse": "EMA weights", "raw_heldout_mse": "raw weights"}, **_FEW),
    Panel("Variational bound, bits per dimension", {"vb": "vb"}, log=True),
    Panel("Loss by quarter of the schedule", {f"loss_q{i + 1}": name for i, name in enumerate(_QUARTERS)}, log=True),
    Panel("Mean squared error by quarter", {f"mse_q{i + 1}": name for i, name in enumerate(_QUARTERS)}, log=True),
    Panel("Held-out mse by quarter, EMA weights", {f"heldout_mse_q{i + 1}": name for i, name in enumerate(_QUARTERS)}, **_FEW),
    Panel(
        "Held-out mse by quarter, raw weights", {f"raw_heldout_mse_q{i + 1}": name for i, name in enumerate(_QUARTERS)}, **_FEW
    ),
    Panel("Norm of the gradient, before clipping", {"grad_norm": "norm"}, log=True),
    Panel("Norm of the parameters", {"param_norm": "norm"}, smooth=False),
    Panel("Learning rate", {"learning_rate": "rate"}, smooth=False),
    Panel("Skipped steps", {"skipped": "so far", "skipped_in_a_row": "in a row"}, smooth=False, zero=True),
    Panel("Images a second", {"time_images_per_second": "images/s"}, zero=True),
    Panel("Seconds a step", {"time_per_step": "step", "time_waiting_for_data": "waiting for data in it"}, zero=True),
    Panel("Model FLOPs utilisation", {"time_mfu": "share of the peak"}, zero=True),
    Panel("Goodput", {"time_goodput": "share of the time"}, smooth=False, zero=True),
    Panel("Seconds spent", {"time_total": "by all processes", "time_paused": "paused by this one"}, smooth=False, zero=True),
)


def panels_of(metrics: Metrics) -> Iterator[Panel]:
    """The panels that a run has something for; of metrics that no panel knows, each has its own, evaluations first."""
    known = {name for panel in PANELS for name in panel.names}
    others = [name for name in metrics if name not in known]
    for name in filter(is_evaluation, others):
        yield Panel(name.replace("_", " "), {name: name}, smooth=False, marks=True)
    for panel in PANELS:
        names = {name: label for name, label in panel.names.items() if name in metrics}
        if names:
            yield dataclasses.replace(panel, names=names)
    for name in others:
        if not is_evaluation(name):
            yield Panel(name.replace("_", " "), {name: name})


def is_evaluation(name: str) -> bool:
    return name.startswith("eval_")


def thin(values: np.ndarray, limit: int = _POINTS) -> np.ndarray:
    """Indices of at most about `limit` values: the least and the greatest of as many stretches of equal length."""
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), limit // 2 + 1).astype(int)
    stretches = list(itertools.pairwise(edges))
    extremes = [a + pick(values[a:b]) for a, b in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *extremes, len(values) - 1])


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a thirtieth of the values around each."""
    half = len(values) // 60
    sums = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw(panel: Panel, metrics: Metrics) -> Html:
    """A figure: title, legend with the last values, and the diagram."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "".join(panel.names),
        "font.size": 8.5,
        "path.simplify_threshold": 0.2,
        **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK),
    }
    finite = {name: np.isfinite(metrics[name][1]) for name in panel.names}
    lost = sum(int((~kept).sum()) for kept in finite.values())
    shown = {name: (metrics[name][0][kept], metrics[name][1][kept]) for name, kept in finite.items() if kept.any()}
    colours, keys, points, file = dict(zip(panel.names, itertools.cycle(_COLOURS), strict=False)), [], [], io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.3))
        axis = figure.add_axes(_BOX)
        for name, (steps, values) in shown.items():
            _plot(axis, panel, steps, values, colours[name])
            chosen = thin(values)
            points.append([[int(step), float(f"{value:.4g}")] for step, value in zip(steps[chosen], values[chosen], strict=True)])
            dot = Html(f'<i style="background:{colours[name]}"></i>')
            keys.append(tag("span", dot, panel.names[name], " ", tag("b", points[-1][-1][1])))
        _scale(axis, panel, [values for _, values in shown.values()])
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    note = tag("small", f"{lost} not finite, not drawn") if lost else ""
    head = tag("figcaption", tag("h3", panel.title), tag("p", *keys, note, Html("<output></output>"), class_="keys"))
    plot = tag("div", _inline(file.getvalue()), Html("<u></u>"), class_="plot")
    hover = {"box": [_BOX[0], _BOX[0] + _BOX[2]], "limits": axis.get_xlim(), "series": points}
    return tag("figure", head, plot, class_="panel", data_hover=json.dumps(hover, separators=(",", ":")))


def _plot(axis, panel: Panel, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One curve: the values, and of many the smoothed ones over them."""
    chosen = thin(values)
    if panel.smooth and len(values) >= _SMOOTHED:
        axis.plot(steps[chosen], values[chosen], linewidth=0.7, alpha=0.35, color=colour)
        kept = np.unique(np.linspace(0, len(values) - 1, _POINTS // 2).astype(int))
        axis.plot(steps[kept], smoothed(values)[kept], linewidth=1.6, color=colour)
    else:
        marker = "o" if panel.marks or len(values) == 1 else None
        axis.plot(steps[chosen], values[chosen], linewidth=1.4, marker=marker, markersize=3.5, color=colour)


def _scale(axis, panel: Panel, series: list[np.ndarray]) -> None:
    """The axes and their ticks."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = np.concatenate(series) if series else np.zeros(1)
    low, high = values.min(), values.max()
    if panel.log and 0 < 4 * low < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.zero:
        axis.set_ylim(0, 1.06 * high or 1)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 2.5, 5, 10)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_alpha(0.4)
    axis.tick_params(length=2)
    axis.grid(alpha=0.15, linewidth=0.6)


def _inline(svg: str) -> Html:
    """What matplotlib wrote, as part of a page: no prologue, no names that several diagrams share, the page's colours."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">', svg
    )
    return Html(re.sub(r">\s+<", "><", svg))
