"""Reads a written report the way a browser does, as far as tests need it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from branchtree.report import write_page

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """What a test wants to know about a page, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]

    def count(self, tag: str, kind: str = "") -> int:
        return sum(
            name == tag and (not kind or kind in (attrs.get("class") or "").split()) for name, attrs in self.tags
        )


def assert_self_contained(shown: Page) -> None:
    """Nothing is fetched, nothing runs."""
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in shown.tags}
    for attribute in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
        for value in shown.values(attribute):
            assert value.startswith(("data:image/", "data:video/mp4;", "#"))
    assert "://" not in shown.raw
    assert "@import" not in shown.raw
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", shown.raw))
    assert not [name for _, attrs in shown.tags for name in attrs if name.startswith("on")]


def assert_well_formed(shown: Page) -> None:
    """Tags are balanced, and what is referred to is there."""
    assert shown.open == []
    ids = shown.values("id")
    assert len(ids) == len(set(ids))
    referred = [value[1:] for value in shown.values("href") if value.startswith("#")]
    assert {*referred, *re.findall(r"url\(#([^)]*)\)", shown.raw)} <= set(ids)
    assert set(shown.values("aria-labelledby")) <= set(ids)


def assert_described(shown: Page) -> None:
    """Every picture, drawing and video says what it shows."""
    for tag, attrs in shown.tags:
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs["role"] == "img" and attrs["aria-label"]
        if tag == "video":
            assert attrs["aria-label"]


def page(run: Path) -> Page:
    return Page(write_page(run).read_text(encoding="utf-8"))
