"""PDF pages, text and code."""

import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from data_pipelines.exceptions import DataError
from data_pipelines.importers import documents
from data_pipelines.importers.documents import TextReader, pdf_pages
from data_pipelines.media.image import image_size


@pytest.fixture
def pdf(tmp_path):
    """Two pages with text, one without."""
    (tmp_path / "src/sub").mkdir(parents=True)
    path = tmp_path / "src/sub/doc.pdf"
    with PdfPages(path) as pages:
        for text in ("Total amount: 1,240.00 EUR", "", "Second page with other words"):
            figure = Figure(figsize=(4, 3))
            figure.text(0.1, 0.5, text)
            pages.savefig(figure)
    return path


def test_pages_are_images_with_their_text(tmp_path, pdf, bring, imported, rejected, texts):
    assert bring(tmp_path / "src", max_bad=0.5)["format"] == "pdf"
    samples = imported()
    assert [record["id"] for record, _ in samples] == ["sub%2Fdoc.pdf-0000000", "sub%2Fdoc.pdf-0000002"]
    assert [texts(record)[1] for record, _ in samples] == ["Total amount: 1,240.00 EUR", "Second page with other words"]
    assert image_size(samples[0][1]["image0.png"]) == (600, 451)  # 4 x 3 inches at 150 dpi, rounded up by PDFium
    assert rejected()[0]["where"] == "sub/doc.pdf:2"


def test_a_huge_page_is_rendered_smaller(pdf, monkeypatch):
    monkeypatch.setattr(documents, "MAX_PAGE_PIXELS", 10000)
    width, height = image_size(next(pdf_pages(pdf, dpi=150)).png)
    assert 9000 < width * height < 10500


def test_bad_pdfs(tmp_path, monkeypatch, pdf):
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    with pytest.raises(DataError, match="cannot be rendered"):
        list(pdf_pages(tmp_path / "cut.pdf", dpi=100))
    monkeypatch.setattr(documents, "MAX_PAGES", 2)
    with pytest.raises(DataError, match="has 3 pages, more than 2"):
        list(pdf_pages(pdf, dpi=100))


def test_code_is_asked_for_its_second_half(tmp_path, bring, imported, rejected, texts):
    (tmp_path / "src/pkg").mkdir(parents=True)
    (tmp_path / "src/pkg/a.py").write_text("def one():\n    return 1\n\n\ndef two():\n    return 2\n")
    (tmp_path / "src/pkg/b.py").write_bytes(b"\xff\xfe")
    (tmp_path / "src/pkg/c.py").write_text("")
    assert bring(tmp_path / "src", max_bad=0.9)["format"] == "code"
    ((record, _),) = imported()
    assert texts(record) == ["Complete this file.\n\ndef one():\n    return 1", "def two():\n    return 2"]
    assert [line["where"] for line in rejected()] == ["pkg/b.py", "pkg/c.py:1"]


def test_long_text_is_cut_without_loss(tmp_path):
    text = "".join(f"Paragraph {i} of the text.\n\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    reader = TextReader((".txt",), "Go on.", piece_bytes=1000)
    (unit,) = reader.units(tmp_path, None)
    rows = list(reader.rows(tmp_path, unit))
    assert len(rows) > 6
    joined = "".join(row.values["question"].removeprefix("Go on.\n\n") + row.values["answer"] for row in rows)
    assert joined.replace("\n", "") == text.replace("\n", "")
