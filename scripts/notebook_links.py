"""A hook of mkdocs: links from notebooks to Markdown files, right in the repository, lead to the site's pages."""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r'href="((?!https?:)[^"#]+)\.md(#[^"]*)?"')


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Return a page's HTML; mkdocs itself turns the links of Markdown pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return LINK.sub(r'href="\1.html\2"', html)
