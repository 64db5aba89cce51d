"""A folder of mixed files, of real text, to passages, questions and a knowledge base without a hand's work, timed.

    NANOCHAT_DATA=folder python -m bench.own --output data/own --json

The files are Wikipedia's articles (wiki_2018plus.jsonl.gz), a fifth each as .txt, .md, .html, .pdf and .docx, beside a
broken one, an empty one and a copy. Then scripts.prepare_rag_dataset --mode own does its work on them, as a user's.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench.common import print_figures, run_script
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.dataset import iter_records

SUFFIXES = (".txt", ".md", ".html", ".pdf", ".docx")


@dataclass(kw_only=True)
class Config:
    """Make files and turn them into a data set."""

    output: Path
    """Folder for files/ and what is made of them."""
    files: int = 300
    """How many."""
    longest: int = 6000
    """Characters of an article; the rest is cut, at the end of a paragraph."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def write_file(path: Path, title: str, paragraphs: list[str]) -> None:
    if path.suffix == ".txt":
        path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    elif path.suffix == ".md":
        path.write_text(f"# {title}\n\n" + "\n\n".join(paragraphs), encoding="utf-8")
    elif path.suffix == ".html":
        body = "".join(f"<p>{html.escape(paragraph)}</p>\n" for paragraph in paragraphs)
        head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        path.write_text(f"{head}<nav>Home | Index</nav><main><h1>{html.escape(title)}</h1>{body}</main>", "utf-8")
    elif path.suffix == ".pdf":
        from fpdf import FPDF

        plain = [text.encode("latin-1", "replace").decode("latin-1") for text in (title, *paragraphs)]
        pdf = FPDF()
        pdf.set_title(plain[0])
        pdf.add_page()
        pdf.set_font("Helvetica", size=11)
        for text in plain:
            pdf.multi_cell(0, 6, text, new_x="LMARGIN", new_y="NEXT")
            pdf.ln(3)
        pdf.output(str(path))
    else:
        from docx import Document

        document = Document()
        document.add_heading(title, 1)
        for paragraph in paragraphs:
            document.add_paragraph(paragraph)
        document.save(str(path))


def make_files(config: Config, source: Path) -> Path:
    folder = config.output / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    long_enough = (record for _, record in iter_records(source) if len(record["text"]) > 1200)
    for number, record in enumerate(islice(long_enough, config.files)):
        paragraphs, size = [], 0
        for paragraph in filter(None, map(str.strip, record["text"].split("\n\n"))):
            size += len(paragraph)
            if size > config.longest:
                break
            paragraphs.append(paragraph)
        name = re.sub(r"\W+", "_", record["title"])[:60]
        write_file(folder / f"{name}{SUFFIXES[number % 5]}", record["title"], paragraphs or [record["text"][:1200]])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    (folder / "empty.txt").touch()
    first = next(folder.glob("*.txt"))
    shutil.copy(first, folder / f"copy_of_{first.name}")
    return folder


def main() -> None:
    config = load_config(Config)
    source = Path(os.environ.get("NANOCHAT_DATA", "")) / "wiki_2018plus.jsonl.gz"
    if not source.is_file():
        raise UserError("set NANOCHAT_DATA to the folder that holds wiki_2018plus.jsonl.gz")
    folder = make_files(config, source)
    made = len(list(folder.iterdir()))
    began = time.perf_counter()
    data = config.output / "data"
    shutil.rmtree(data, ignore_errors=True)
    (config.output / "log.txt").unlink(missing_ok=True)  # of an earlier run
    own = ["--mode", "own", "--documents", folder, "--output", data, "--retriever_type", "bm25"]
    run_script(config.output, "scripts.prepare_rag_dataset", *own)
    seconds = time.perf_counter() - began
    print((config.output / "log.txt").read_text(encoding="utf-8"))
    count = lambda path: len(path.read_text(encoding="utf-8").splitlines())  # noqa: E731
    questions = {path.stem: count(path) for path in sorted((data / "queries").glob("*.jsonl"))}
    sources = {json.loads(line)["source"] for line in (data / "documents.jsonl").read_text("utf-8").splitlines()}
    figures = {"files": made, "files_read": len(sources), "passages": count(data / "documents.jsonl")}
    figures |= {f"questions_{split}": number for split, number in questions.items()} | {"seconds": seconds}
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
