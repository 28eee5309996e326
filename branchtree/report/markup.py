"""Text and numbers as HTML. Everything that comes from a run passes through ``escape``: prompts are not trusted."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
Titled = tuple[str, str, str, str]
"""A section of a page: anchor, title, body and lead, all but the title HTML."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def escape(text: object) -> str:
    """Return a text that is safe between tags and in quoted attributes; characters that HTML lacks are replaced."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits; whole numbers in full, with thousands separated."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e15:
        shown = f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    elif 1 <= abs(value) < 1e6:
        shown = f"{value:.{max(digits - len(str(int(abs(value)))), 0)}f}"
    elif 1e-4 <= abs(value) < 1:
        shown = f"{value:#.{digits}g}"
    else:
        shown = f"{value:.{digits - 1}e}"
    return shown.replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """Return a change: a number that always has its sign."""
    shown = number(value, digits)
    return shown if value is None or value <= 0 else f"+{shown}"


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage."""
    return MISSING if fraction is None else f"{100 * fraction:.1f}\N{NARROW NO-BREAK SPACE}%".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Return seconds in words, in their two largest units."""
    if seconds is None or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remainder} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], classes: str = "") -> str:
    """Return a table whose first column names its rows; cells and heads are HTML already, the caption is text."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="{classes}">'
        f"<caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(fraction: float | None, colour: int = 0) -> str:
    """Return a fraction as a percentage with a bar beside it."""
    width = 0.0 if fraction is None else 100 * min(max(fraction, 0.0), 1.0)
    fill = f'<span class="bar" aria-hidden="true"><span class="c{colour}" style="width:{width:.2f}%"></span></span>'
    return f'<span class="share">{fill}<span>{percent(fraction)}</span></span>'


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """Return a section of a page; ``lead`` is HTML above its body."""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{intro}{body}</section>'
    )


def fill_page(
    kicker: str,
    title: str,
    status: str,
    head: str,
    sections: Sequence[Titled],
    origin: str,
    style: str = "",
    sources: str = "",
) -> str:
    """A page that needs nothing beside itself; sections without a body are left out.

    Args:
        kicker: What kind of page it is.
        title: Its title, as text.
        status: How far what it shows has come.
        head: What stands between the title and the contents.
        sections: What stands below the contents.
        origin: What it was made from, in words.
        style: Rules beside those of all pages.
        sources: What the content security policy allows beside inline styles.
    """
    shown = [each for each in sections if each[2]]
    resources = files("branchtree.report")
    return Template(resources.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        style=resources.joinpath("style.css").read_text(encoding="utf-8") + style,
        sources=sources,
        kicker=kicker,
        title=escape(title),
        status=status,
        head=head,
        contents="".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _, _ in shown),
        body="".join(section(*each) for each in shown),
        origin=origin,
    )
