"""Read a page strictly: every element is closed in order, and every id is used once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "br", "hr", "img", "input"}
OUTSIDE = re.compile(r"(?:https?:)?//|@import|url\((?!#)")


@dataclass
class Element:
    """An element with its attributes and the text below it."""

    tag: str
    attributes: dict[str, str]
    parents: tuple[str, ...]
    text: str = ""


@dataclass
class Parsed(HTMLParser):
    """The elements of a page, in the order in which they begin."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of <{tag}> is repeated"
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(e.tag for e in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {[e.tag for e in self.open]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def of_class(self, name: str) -> list[Element]:
        return [element for element in self.elements if name in element.attributes.get("class", "").split()]


def parse_page(page: str) -> Parsed:
    """Parse a page and assert what holds for all pages of this project."""
    page.encode("utf-8")  # no lone surrogates
    assert "\0" not in page
    parsed = Parsed()
    parsed.feed(page)
    parsed.close()
    assert not parsed.open, f"not closed: {[element.tag for element in parsed.open]}"
    _assert_self_contained(parsed)
    ids = [element.attributes["id"] for element in parsed.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids)), "an id is used twice"
    for element in parsed.elements:
        references = [element.attributes.get("aria-labelledby", "")]
        for name, value in element.attributes.items():
            references += re.findall(r"url\(#([^)]+)\)", value)
            if name.endswith("href"):
                references.append(value.removeprefix("#") if value.startswith("#") else "")
        assert {*references} - {""} <= {*ids}, "a reference has no target"
    _assert_accessible(parsed)
    return parsed


def _assert_self_contained(parsed: Parsed) -> None:
    assert not parsed.all("script") and not parsed.all("iframe") and not parsed.all("object")
    for element in parsed.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"<{element.tag} {name}>"
            if name in ("src", "srcset", "href", "xlink:href", "action", "style"):
                assert value == "data:," or not OUTSIDE.search(value), f"<{element.tag} {name}={value!r}>"
                assert not name.endswith("href") or value.startswith(("#", "data:,")), value
    for style in parsed.all("style"):
        assert not OUTSIDE.search(style.text)


def _assert_accessible(parsed: Parsed) -> None:
    assert parsed.all("html")[0].attributes["lang"] == "en"
    assert parsed.all("title")[0].text
    levels = [int(e.tag[1]) for e in parsed.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for svg in parsed.all("svg"):
        assert svg.attributes["role"] == "img" and svg.attributes["aria-label"]
    for mark in (*parsed.of_class("mark"), *parsed.of_class("verdict")):
        assert mark.text[:2] in ("✓ ", "✗ ", "– ", "ℹ "), "a color is the only sign"  # noqa: RUF001


def values_of(parsed: Parsed) -> list[list[list[str]]]:
    """The rows of the table of values of each plot."""
    tables: list[list[list[str]]] = []
    for element in parsed.elements:
        if "details" in element.parents:
            if element.tag == "tbody":
                tables.append([])
            elif element.tag == "tr" and "tbody" in element.parents:
                tables[-1].append([])
            elif element.tag == "td":
                tables[-1][-1].append(element.text)
    return tables
