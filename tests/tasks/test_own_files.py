"""Files as people have them: what is read, where its headings are, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat.common import UserError
from tasks.own_files import Text, _join_lines, read_files

PAGE = """<!doctype html><html><head><title>The Bridge &amp; I</title><style>p{}</style><script>x = 1</script></head>
<body><nav>Home | About</nav><!-- a comment --><main><h1>The bridge</h1><p>It is <b>old</b>.<br>Very   old.</p>
<h2>Size <i>now</i></h2><ul><li>12 m</li><li><p>3 spans</p></li></ul><div>Loose <span>words</span></div>
<table><tr><th>Year</th><th>Event</th></tr><tr><td>1904</td><td>built</td></tr></table><pre>a  b
  c</pre></main><footer>Copyright</footer></body></html>"""


def read_one(path: Path) -> Text:
    (text,), unread = read_files([path])
    assert unread == []
    return text


def sections(text: Text) -> list[str]:
    starts = [at for at, _ in text.headings]
    assert all(text.content[at:].startswith(heading) for at, heading in text.headings)
    return [text.content[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_html_without_its_furniture(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    text = read_one(path)
    assert text.title == "The Bridge & I" and text.id == text.source == "page.html"
    assert sections(text) == [
        "The bridge\n\nIt is old.\nVery old.",
        "Size now\n\n- 12 m\n- 3 spans\n\nLoose words\n\nYear | Event\n1904 | built\n\na  b\n  c",
    ]
    path.write_bytes('<meta charset="iso-8859-1"><p>caf\u00e9'.encode("latin-1"))
    assert read_one(path).content == "café" and read_one(path).title == "page"


def test_markdown(tmp_path):
    path = tmp_path / "my_notes.md"
    path.write_text(
        "---\ndraft: true\n---\nIntro, see [the site](http://x.y).\n\n"
        "# One\n\nA *strong*\nline.\n\n- a\n- b\n\n## Two\n\n"
        "| k | v |\n|---|---|\n| x | 1 |\n\n```python\nif a:\n    b\n```\n"
    )
    text = read_one(path)
    assert text.title == "One" and [heading for _, heading in text.headings] == ["One", "Two"]
    assert text.content.startswith("Intro, see the site.\n\nOne\n\nA strong line.\n\n- a\n- b\n\nTwo")
    assert sections(text)[1] == "Two\n\nk | v\nx | 1\n\nif a:\n    b"
    path.write_text("just text")
    assert read_one(path).title == "my notes"


def test_text_in_several_encodings(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        path.write_bytes("Über Brücken\r\n\r\nEs ist – alt.".encode(encoding))
        text = read_one(path)
        assert (text.title, text.content) == ("Über Brücken", "Über Brücken\n\nEs ist – alt."), encoding
    path.write_text("A sentence, not a title.")
    assert read_one(path).title == "a"


def test_jsonl_keeps_ids_and_fields(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        {"id": "x", "title": "T", "content": "c", "source": "s", "year": 3},
        {"id": "y", "title": "", "content": "d"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    texts, _ = read_files([path])
    assert [(t.id, t.title, t.content, t.source, t.metadata) for t in texts] == [
        ("x", "T", "c", "s", {"year": 3}),
        ("y", "", "d", "d.jsonl", {}),
    ]


def test_pdf_by_pages(tmp_path):
    fpdf = pytest.importorskip("fpdf")
    pytest.importorskip("pypdf")

    def write(name: str, *pages: str, password: str = "") -> None:
        pdf = fpdf.FPDF()
        pdf.set_title("On Bridges")
        if password:
            pdf.set_encryption(owner_password="o", user_password=password)
        for page in pages:
            pdf.add_page()
            pdf.set_font("helvetica", size=12)
            pdf.multi_cell(60, 6, page)  # so narrow that lines break
        pdf.output(str(tmp_path / name))

    pages = "The first page says this.", "The second page says that."
    write("a.pdf", *pages)
    text = read_one(tmp_path / "a.pdf")
    assert text.title == "On Bridges"
    assert text.content == "The first page says this.\n\nThe second page says that."
    assert text.metadata == {"pages": [0, text.content.index("The second")]}
    write("b.pdf", *pages, password="u")
    write("c.pdf", "")
    (tmp_path / "d.pdf").write_bytes((tmp_path / "a.pdf").read_bytes()[:300])
    texts, unread = read_files([tmp_path])
    assert [t.id for t in texts] == ["a.pdf"]
    assert [u.path for u in unread] == ["b.pdf", "c.pdf", "d.pdf"]
    assert "encrypted" in unread[0].reason and "scanned" in unread[1].reason and "cannot be read" in unread[2].reason


def test_lines_of_a_pdf_are_paragraphs_again():
    page = "The bridge was re-\nbuilt in 1904\nby hand.\nA new sentence:\n• one\n• two\n1. three"
    assert _join_lines(page) == "The bridge was rebuilt in 1904 by hand.\nA new sentence:\n• one\n• two\n1. three"


def test_docx_with_headings_lists_and_tables(tmp_path):
    docx = pytest.importorskip("docx")
    file = docx.Document()
    file.add_heading("The bridge", 0)
    file.add_paragraph("It is old.")
    file.add_heading("Size", 1)
    file.add_paragraph("12 m", style="List Bullet")
    file.add_paragraph("3 spans", style="List Bullet")
    table = file.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "Year", "1904"
    file.save(str(tmp_path / "a.docx"))
    text = read_one(tmp_path / "a.docx")
    assert text.title == "The bridge"
    assert sections(text) == ["The bridge\n\nIt is old.", "Size\n\n- 12 m\n- 3 spans\nYear | 1904"]


def test_folders_are_read_whole_and_what_cannot_be_read_is_said(tmp_path):
    for name, data in {
        "b/same.txt": b"one", "a/same.txt": b"two", ".git/x.txt": b"hidden", "a/.hidden.txt": b"hidden",
        "pic.png": b"\x89PNG", "empty.md": b"", "bin.txt": b"a\0b", "bad.docx": b"PK", "bad.jsonl": b'{"id": 3}',
        "Makefile": b"all:",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    texts, unread = read_files([tmp_path])
    assert [(t.id, t.content) for t in texts] == [("a/same.txt", "two"), ("b/same.txt", "one")]
    assert {u.path for u in unread} == {"pic.png", "empty.md", "bin.txt", "bad.docx", "bad.jsonl", "Makefile"}
    both, _ = read_files([tmp_path / "a", tmp_path / "b"])
    assert [t.id for t in both] == ["same.txt", "same.txt (2)"]
    with pytest.raises(UserError, match="not there"):
        read_files([tmp_path / "none"])
    with pytest.raises(UserError, match=r"no text found; empty\.md: has no text"):
        read_files([tmp_path / "empty.md"])


def test_hostile_html_is_an_error_of_its_own_file(tmp_path):
    (tmp_path / "deep.html").write_text("<div>" * 100_000 + "x")
    (tmp_path / "fine.html").write_text("<p>fine")
    texts, unread = read_files([tmp_path])
    assert [t.content for t in texts] == ["fine"] and [u.path for u in unread] == ["deep.html"]
