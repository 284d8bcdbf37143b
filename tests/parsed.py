"""A page of HTML, parsed: what tests ask of pages."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, and the text of elements by tag or class."""

    VOID = frozenset(("meta", "img", "br", "input"))

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, dict[str, str], str]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        assert not self.open, f"left open: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag, attrs):
        known = {key: value or "" for key, value in attrs}
        self.tags.append((tag, known))
        if tag not in self.VOID:
            self.open.append((tag, known, []))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, known, text = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        self.texts.append((tag, known, "".join(text)))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def of(self, name: str) -> list[str]:
        """Texts of the elements with this tag or class."""
        return [text for tag, known, text in self.texts if name in (tag, *known.get("class", "").split())]
