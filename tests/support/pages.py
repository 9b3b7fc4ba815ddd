"""What every HTML report must be: well-formed, self-contained, with its text escaped."""

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}
FETCHING = ("src", "href", "srcset", "poster", "data", "action", "background")


@dataclass
class ParsedPage(HTMLParser):
    """Tags, headings, text and references of a page; raises at a tag that is not closed."""

    tags: Counter = field(default_factory=Counter)
    headings: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    ids: Counter = field(default_factory=Counter)
    text: str = ""
    attributes: list[tuple[str, str]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.attributes += attrs
        self.references += [value or "" for name, value in attrs if name in FETCHING]
        self.ids.update(value for name, value in attrs if name == "id")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (self.open[-3:], tag, self.getpos())
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def check_page(text):
    """Parse a report and check what holds for all of them."""
    assert text.startswith("<!doctype html>")
    page = ParsedPage()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.tags["html"] == page.tags["head"] == page.tags["body"] == page.tags["h1"] == 1
    assert page.tags["script"] == page.tags["style"] == 1  # none comes from the user
    assert all(one.startswith(("data:image/", "#")) for one in page.references), page.references
    targets = {one[1:] for one in page.references if one.startswith("#")}
    assert targets <= set(page.ids) and set(page.ids.values()) <= {1}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "prefers-color-scheme: dark" in style and not re.search(r"@import|url\(", style)
    assert not re.search(r"url\((?!#)", text) and "`" not in page.text
    assert "default-src 'none'" in text
    return page
