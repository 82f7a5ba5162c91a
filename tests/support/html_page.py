"""A page of the report, parsed: tags, texts, and what every page must hold."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "br"}
FOREIGN_EMPTY = {"path", "circle"}  # of SVG, closed by "/>"


class Page(HTMLParser):
    """Collects tags and checks their nesting."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in FOREIGN_EMPTY
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict]:
        return [found for name, found in self.tags if name == tag and kind in found.get("class", "").split() + [""]]


def check_self_contained(page: Page) -> None:
    """No scripts, nothing from elsewhere, balanced styles, and pictures that have a text and can be decoded."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        sources = [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert style.count("{") == style.count("}")
    images = page.all("img")
    assert all(image["alt"] for image in images)
    for uri in {image["src"] for image in images}:
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).load()
