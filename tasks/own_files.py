"""Texts out of files as people have them: .jsonl, .txt, .md, .html, .pdf, .docx.

    texts, unread = read_files([Path("my_folder")])

A folder is read with all below it, hidden files left out. What has structure keeps it: where each heading is. Page
furniture (menus, scripts, footers) is left out of HTML; PDF's lines are joined into paragraphs again. A file that
cannot be read is reported in `unread` and the others are read all the same.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import read_documents

MAX_FILE_BYTES = 200_000_000


@dataclass
class Text:
    """The text of a file, or of a line of a .jsonl. headings: (where its section begins, heading)."""

    id: str
    title: str
    content: str
    source: str
    headings: list[tuple[int, str]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unread:
    path: str
    reason: str


def read_files(paths: Sequence[Path]) -> tuple[list[Text], list[Unread]]:
    """Every file of these, or in these folders. Raises UserError where a path is not there or nothing can be read."""
    texts: list[Text] = []
    unread: list[Unread] = []
    for root in paths:
        if not root.exists():
            raise UserError(f"{root} is not there; give a file or a folder")
        for path in _files(root):
            name = str(path.relative_to(root)) if root.is_dir() else path.name
            read = READERS.get(path.suffix.lower())
            if read is None:
                unread.append(Unread(name, f"{path.suffix or 'no'} files are not read; use {', '.join(READERS)}"))
                continue
            try:
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise UserError(f"is over {MAX_FILE_BYTES // 1_000_000} MB; divide it")
                found = read(path, name)
            except ModuleNotFoundError as error:
                missing = (error.name or "").split(".")[0]
                raise UserError(
                    f"{name}: {path.suffix} files need {missing}: pip install 'nanochat[own]', or leave them out"
                ) from None
            except UserError as error:
                unread.append(Unread(name, str(error)))
                continue
            except Exception as error:  # the libraries raise all kinds of errors on damaged files
                unread.append(Unread(name, f"cannot be read ({type(error).__name__}: {error})".replace("\n", " ")))
                continue
            whole = [text for text in found if text.content.strip()]
            if not whole:
                unread.append(Unread(name, "has no text" + (": scanned?" if path.suffix.lower() == ".pdf" else "")))
            texts += whole
    if not texts:
        why = f"; {unread[0].path}: {unread[0].reason}" if unread else ""
        raise UserError(f"{', '.join(map(str, paths))}: no text found{why}")
    _make_unique(texts)
    return texts, unread


def _files(root: Path) -> Iterable[Path]:
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _make_unique(texts: list[Text]) -> None:
    """Two folders may have a file of the same name."""
    seen: dict[str, int] = {}
    for text in texts:
        seen[text.id] = seen.get(text.id, 0) + 1
        if seen[text.id] > 1:
            text.id = f"{text.id} ({seen[text.id]})"


# --- one reader for each kind


def _jsonl(path: Path, name: str) -> list[Text]:
    return [
        Text(document.id, document.title, document.content, document.source or name, metadata=document.metadata)
        for document in read_documents(path)
    ]


def _txt(path: Path, name: str) -> list[Text]:
    content = _decode(path)
    first = content.lstrip().split("\n", 1)[0].strip()
    titled = 0 < len(first) <= 80 and first[-1] not in ".,;:"  # a line by itself, like a heading
    return [Text(name, first if titled else _title_of(name), content, name)]


def _decode(path: Path) -> str:
    data = path.read_bytes()
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            raise UserError("is no text: it has NUL bytes")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    raise UserError("is neither UTF-8 nor cp1252; convert it: iconv -f ENCODING -t utf-8 OLD > NEW")


def _title_of(name: str) -> str:
    return re.sub(r"[_-]+", " ", Path(name).stem).strip() or name


def _markdown(path: Path, name: str) -> list[Text]:
    from markdown_it import MarkdownIt

    content = re.sub(r"\A---\n.*?\n---\n", "", _decode(path), flags=re.DOTALL)  # front matter
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(content)
    return [_from_html(html, name)]


def _html(path: Path, name: str) -> list[Text]:
    return [_from_html(_decode_html(path), name)]


def _decode_html(path: Path) -> str:
    import logging

    from bs4 import UnicodeDammit

    logging.getLogger("bs4.dammit").setLevel(logging.ERROR)  # it warns of single bytes, and not in which file
    found = UnicodeDammit(path.read_bytes(), is_html=True).unicode_markup  # pages say their encoding themselves
    if found is None:
        raise UserError("has an encoding that is not known")
    return found


FURNITURE = ["head", "script", "style", "noscript", "template", "nav", "footer", "aside", "button", "select", "svg"]
INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "del", "dfn", "em", "font", "i", "ins", "kbd", "label"}
INLINE |= {"tbody", "tfoot", "thead"} | {
    "mark",
    "q",
    "s",
    "samp",
    "small",
    "span",
    "strong",
    "sub",
    "sup",
    "time",
    "tt",
    "u",
    "var",
}
_HEADING = re.compile(r"h[1-6]$")


def _from_html(html: str, name: str) -> Text:
    from bs4 import BeautifulSoup, CData, NavigableString, Tag

    soup = BeautifulSoup(html, "html.parser")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for tag in soup.find_all(FURNITURE):
        tag.decompose()
    mains = soup.find_all(["main", "article"])
    body = mains[0] if len(mains) == 1 else soup
    builder = _Builder()

    def walk(tag: Tag) -> None:
        for child in tag.children:
            if isinstance(child, Tag):
                if child.name == "br":
                    builder.end_line()
                elif _HEADING.match(child.name):
                    builder.heading(child.get_text(" ", strip=True))
                elif child.name == "pre":
                    builder.block(child.get_text())
                elif child.name == "tr":
                    cells = [cell.get_text(" ", strip=True) for cell in child.find_all(["td", "th"])]
                    builder.block(" | ".join(cell for cell in cells if cell))
                elif child.name in INLINE or (child.name == "p" and tag.name == "li"):
                    walk(child)
                    builder.words(" " if child.name == "p" else "")
                elif child.name in ("li", "dt", "dd"):
                    builder.end_line()
                    builder.words("- " if child.name == "li" else "")
                    walk(child)
                    builder.end_line()
                else:
                    builder.end_block()
                    walk(child)
                    builder.end_block()
            elif type(child) in (NavigableString, CData):  # not comments and doctypes
                builder.words(re.sub(r"\s+", " ", child))

    walk(body)
    content, headings = builder.finish()
    return Text(name, title or (headings[0][1] if headings else _title_of(name)), content, name, headings)


class _Builder:
    """Text from blocks, with the places of its headings."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self.line = ""
        self.headings: list[tuple[int, str]] = []

    def words(self, text: str) -> None:
        self.line += text.lstrip() if not self.line or self.line.endswith(" ") else text

    def end_line(self) -> None:
        if self.line.strip(" -"):
            self._write(self.line.strip() + "\n")
        self.line = ""

    def end_block(self) -> None:
        self.end_line()
        if self.parts and not "".join(self.parts[-2:]).endswith("\n\n"):
            self._write("\n")

    def block(self, text: str) -> None:
        self.end_line()
        if text.strip():
            self._write(text.strip("\n") + "\n")

    def heading(self, text: str) -> None:
        self.end_block()
        if text:
            self.headings.append((self.length, text))
            self._write(text + "\n\n")

    def _write(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def finish(self) -> tuple[str, list[tuple[int, str]]]:
        self.end_line()
        return "".join(self.parts).rstrip(), self.headings


def _pdf(path: Path, name: str) -> list[Text]:
    import logging

    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every small damage that it then mends
    reader = PdfReader(io.BytesIO(path.read_bytes()))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError("is encrypted")
    pages = [_join_lines(page.extract_text()) for page in reader.pages]
    content, starts = "", []
    for page in pages:
        starts.append(len(content))
        content += f"{page}\n\n" if page else ""
    title = str((reader.metadata and reader.metadata.title) or "").strip()
    return [Text(name, title or _title_of(name), content.rstrip(), name, metadata={"pages": starts})]


def _join_lines(page: str) -> str:
    """Paragraphs in a line each: words that were divided at the end of a line are one again."""
    page = page.replace("\0", "").replace("\u00ad\n", "").strip()
    page = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", page)
    # a line goes on where it does not end a sentence and the next does not begin a list
    return re.sub(r"(?<![.!?:\n])[ \t]*\n(?![\n•*-]|\s*\d+[.)] )", " ", page)


def _docx(path: Path, name: str) -> list[Text]:
    import docx
    from docx.table import Table

    file = docx.Document(io.BytesIO(path.read_bytes()))
    builder = _Builder()
    title = (file.core_properties.title or "").strip()
    for block in file.iter_inner_content():
        if isinstance(block, Table):
            for row in block.rows:
                cells = dict.fromkeys(cell.text.strip() for cell in row.cells)  # merged cells are there twice
                builder.block(" | ".join(cell for cell in cells if cell))
            builder.end_block()
            continue
        style = (block.style.name if block.style else "") or ""
        if style == "Title" and block.text.strip():
            title = title or block.text.strip()
        if style == "Title" or style.startswith("Heading"):
            builder.heading(block.text.strip())
            continue
        builder.block(("- " if style.startswith("List") else "") + block.text.strip())
        if not style.startswith("List"):
            builder.end_block()
    content, headings = builder.finish()
    return [Text(name, title or (headings[0][1] if headings else _title_of(name)), content, name, headings)]


READERS: dict[str, Callable[[Path, str], list[Text]]] = {
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _docx,
}
