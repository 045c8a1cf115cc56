"""HTML by functions: text is escaped unless it was made here, and a page loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
EMPTY = frozenset({"img", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(content: object) -> Markup:
    """Any text as HTML; `Markup` as it is."""
    return content if isinstance(content, Markup) else Markup(html.escape(str(content)))


def join(*children: object) -> Markup:
    """Children one after another; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. A trailing underscore is dropped from attribute names (`class_`)."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in EMPTY:
        return Markup(f"<{name}{pairs}>")
    return Markup(f"<{name}{pairs}>{join(*children)}</{name}>")


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]], caption: str | None = None
) -> Markup:
    """A table whose first column is text and whose other columns are figures."""
    header = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    named = tag("caption", caption) if caption else None
    return tag(
        "div", tag("table", named, tag("thead", header), tag("tbody", *body)), class_="scroll"
    )


def section(title: str, *children: object, note: str | None = None) -> Markup:
    """A titled part of the page, with a line that says how to read it."""
    return tag(
        "section", tag("h2", title), tag("p", note, class_="note") if note else None, *children
    )


def page(title: str, *children: object) -> str:
    """A whole document with the style sheet inside."""
    style = (Path(__file__).parent / "style.css").read_text()
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *children))
    return f"<!doctype html>\n{tag('html', tag('head', head), body, lang='en')}\n"
