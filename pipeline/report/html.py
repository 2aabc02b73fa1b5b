"""Elements of a page, from which no text can break out."""

from __future__ import annotations

from html import escape

from ezsd.pipeline.inference import evaluation_tables as figures

DASH = "\u2013"
"""Where there is no number."""
_VOID = frozenset({"meta", "img"})


class Html(str):
    """Markup as it stands; text that is not Html is escaped when it enters an element."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """One element; of attributes' names, `class_` means class and `http_equiv` means http-equiv."""
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{said}>" if name in _VOID else f"<{name}{said}>{inside}</{name}>")


def section(title: str, lead: str | Html, *body: str) -> Html:
    """A heading, a lead and what follows."""
    return element("section", element("h2", title), element("p", lead, class_="lead"), *body)


def note(text: str, command: str | None = None) -> Html:
    """A remark, with a command that helps if there is one."""
    said = [element("span", text)] + ([Html(" "), element("code", command)] if command else [])
    return element("p", *said, class_="note")


def wide_table(table: Html) -> Html:
    """A table that scrolls by itself where it is wider than the screen."""
    return element("div", table, class_="wide")


def percent(value: float | None) -> str:
    """A share in percent; a dash for none."""
    return DASH if value is None else figures.percent(value)
