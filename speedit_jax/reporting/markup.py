"""Building HTML from values: everything that is not of type `Html` is escaped."""

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

from speedit_jax.data.names import printable

_VOID = ("input", "img")


class Html(str):
    """Text that is HTML."""


def h(value: Any) -> Html:
    """Escaped, fit for text and for attributes in quotes; None is a dash, a number has four digits that count.

    Bytes of a path that are no UTF-8 are written as they are printed elsewhere: a page could not hold them.
    """
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("-")
    if isinstance(value, float):
        value = f"{value:.4g}"
    return Html(html.escape(printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; `class_` is the attribute class, None is no attribute and True one without a value."""
    written = (
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{h(value)}"')
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _VOID else f"{''.join(map(h, children))}</{name}>"
    return Html(f"<{name}{''.join(written)}>{end}")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(map(h, parts)))


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], class_: str | None = None) -> Html:
    """With a header, and columns of numbers to the right; it scrolls by itself where it is too wide for the page."""
    rows = [list(row) for row in rows]
    kinds = ["number" if any(isinstance(cell, int | float) for cell in column) else None for column in zip(*rows, strict=True)]
    names = tag("tr", *(tag("th", name, class_=kind) for name, kind in zip(head, kinds, strict=True)))
    body = (tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows)
    return tag("div", tag("table", tag("thead", names), tag("tbody", *body), class_=class_), class_="scroll")


def pairs(items: Iterable[tuple[Any, Any]]) -> Html:
    """Names and what they are."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items))


def image(data: bytes, kind: str, alt: str) -> Html:
    """The file itself, in the page."""
    return tag("img", alt=alt, src=f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def byte_size(count: float | None) -> str | None:
    """1234567 -> 1.18 MiB."""
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.3g} {unit}"
        count /= 1024


def duration(seconds: float) -> str:
    """4000 -> 1 h 6 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if n]
    return " ".join(parts[:2])
