"""A strict reader of the page: what a browser would forgive is an error here."""

from html.parser import HTMLParser

VOID = {"meta", "input", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Collects elements and text, and asserts that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"attribute twice in <{tag} {names}>"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    @property
    def words(self) -> str:
        """Visible text with single spaces."""
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str]]:
        """Attributes of the elements with a tag and, where given, a class."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if not css_class or css_class in a.get("class", "").split()]
