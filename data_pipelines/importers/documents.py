"""Documents without annotations: PDF pages with their own text as the answer, plain text, and code."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.rows import Rejected, Row, Unit, position_of, split_of
from data_pipelines.importers.tables import root_of, source_files

TEXT_SUFFIXES = (".txt", ".md", ".rst")
CODE_SUFFIXES = (
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".sql", ".rb", ".kt",
    ".swift", ".scala", ".jl", ".lua", ".r",
)  # fmt: skip
MAX_PDF_BYTES = 2**29
MAX_PAGES = 5000
MAX_PAGE_PIXELS = 2**24
MAX_TEXT_BYTES = 2**23
_FILES_PER_UNIT = 64
_MIN_PAGE_TEXT = 16


@dataclass(frozen=True)
class Page:
    """A rendered page: PNG bytes and the text of its text layer."""

    number: int
    png: bytes
    text: str


def pdf_pages(path: Path, *, dpi: int) -> Iterator[Page]:
    """Render a PDF page by page with PDFium.

    A page too large for `MAX_PAGE_PIXELS` is rendered smaller, never cut.

    Raises:
        DataError: Not a PDF, encrypted, damaged, or too large.
    """
    import pypdfium2

    if path.stat().st_size > MAX_PDF_BYTES:
        raise DataError(f"{path.name} is larger than the {MAX_PDF_BYTES} bytes that are read; split it")
    try:
        with pypdfium2.PdfDocument(path) as document:
            if len(document) > MAX_PAGES:
                raise DataError(f"{path.name} has {len(document)} pages, more than {MAX_PAGES}; split it")
            for number in range(len(document)):
                yield _render(document[number], number, dpi)
    except pypdfium2.PdfiumError as error:
        raise DataError(f"{path.name} cannot be rendered: {error}; save it again without a password") from error


def _render(page: Any, number: int, dpi: int) -> Page:
    width, height = page.get_size()
    scale = dpi / 72
    if width * height * scale * scale > MAX_PAGE_PIXELS:
        scale = (MAX_PAGE_PIXELS / (width * height)) ** 0.5
    out = io.BytesIO()
    page.render(scale=scale).to_pil().convert("RGB").save(out, "PNG")
    text = page.get_textpage().get_text_bounded().replace("\r\n", "\n").strip()
    page.close()
    return Page(number, out.getvalue(), text)


@dataclass(frozen=True)
class PdfReader:
    """PDF files: one row a page, with columns image and text.

    Attributes:
        dpi: Resolution of the rendering.
    """

    dpi: int = 150

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """One unit a file."""
        root = root_of(source)
        return [Unit(split or "train", p.relative_to(root).as_posix()) for p in source_files(source, (".pdf",), roots)]

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Pages that have a text layer; the others are rejected, since their text is not known."""
        path = root_of(source) / unit.path
        try:
            for page in pdf_pages(path, dpi=self.dpi):
                where = f"{unit.path}:{page.number + 1}"
                if len(page.text) < _MIN_PAGE_TEXT:
                    yield Rejected(
                        where,
                        "",
                        "row",
                        "page has no text layer; render-pdf makes pages to ask questions about",
                    )
                    continue
                values = {"image": {"bytes": page.png}, "text": page.text}
                yield Row(where, position_of(unit.path, page.number), values, {}, path.parent)
        except DataError as error:
            yield Rejected(unit.path, "", "read", str(error))


@dataclass(frozen=True)
class TextReader:
    """Text or code files: the first half asks, the rest answers, cut at a blank line.

    Attributes:
        suffixes: Extensions taken.
        instruction: What the user text starts with.
        piece_bytes: A longer file becomes several samples of about this size.
    """

    suffixes: tuple[str, ...]
    instruction: str
    piece_bytes: int = 16384

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """Groups of 64 files."""
        root = root_of(source)
        names = [p.relative_to(root).as_posix() for p in source_files(source, self.suffixes, roots)]
        groups = [tuple(names[i : i + _FILES_PER_UNIT]) for i in range(0, len(names), _FILES_PER_UNIT)]
        return [
            Unit(split_of("", split), group[0], first=i * _FILES_PER_UNIT, files=group)
            for i, group in enumerate(groups)
        ]

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Pieces of each file, with columns question and answer."""
        for name in unit.files:
            path = root_of(source) / name
            if path.stat().st_size > MAX_TEXT_BYTES:
                yield Rejected(name, "", "read", f"is larger than {MAX_TEXT_BYTES} bytes; split it")
                continue
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                yield Rejected(name, "", "read", f"not UTF-8 at byte {error.start}; convert it with iconv")
                continue
            for number, piece in enumerate(_pieces(text, self.piece_bytes)):
                half = _cut(piece, len(piece) // 2)
                question, answer = piece[:half].strip("\n"), piece[half:].strip("\n")
                where = f"{name}:{number + 1}"
                if not question or not answer:
                    yield Rejected(where, "", "row", "too short to ask with one half and answer with the other")
                    continue
                values = {"question": f"{self.instruction}\n\n{question}", "answer": answer}
                yield Row(where, position_of(name, number), values, {}, path.parent)


def _pieces(text: str, size: int) -> Iterator[str]:
    while len(text) > size:
        cut = _cut(text, size)
        yield text[:cut]
        text = text[cut:]
    yield text


def _cut(text: str, near: int) -> int:
    """Last paragraph end, else line end, else blank, at or before a place."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, near // 2, near)
        if found > 0:
            return found + len(mark)
    return max(near, 1)
