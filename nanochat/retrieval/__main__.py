"""Build a knowledge base from a JSONL file of documents, or try one.

    python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/my_kb --type bm25
    python -m nanochat.retrieval --documents data/my_documents.jsonl --output data/my_kb --type dense \\
        --model all-MiniLM-L6-v2
    python -m nanochat.retrieval --search "return policy" --knowledge_base data/my_kb --top_k 5

A line of documents: {"id": "policy_001", "title": "Return Policy", "content": "Customers can ...", "source":
"optional"}. The word `prepare_kb` or `build` may stand before the flags of a build, `search` before those of a search.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, print0, run_main
from nanochat.config import load_config
from nanochat.retrieval.document import Document, read_documents
from nanochat.retrieval.knowledge_base import build_knowledge_base
from nanochat.retrieval.manager import RetrievalManager


@dataclass
class Config:
    documents: Path | None = None
    """Build: the JSONL file to read."""
    output: Path | None = None
    """Build: the directory of the knowledge base. One that is there already gets a new version."""
    type: Literal["simple", "bm25", "dense", "hybrid"] | None = None
    """The retriever (build: simple if not given; search: the one the base was built with)."""
    search: str | None = None
    """Search: what to look for."""
    knowledge_base: Path | None = None
    """Search: the knowledge base."""
    top_k: int = 5
    """Search: how many documents to show."""
    model: str | None = None
    """dense, hybrid: a sentence-transformers model, by name or folder (all-MiniLM-L6-v2)."""
    device: str | None = None
    """dense, hybrid: where the model runs (cpu, cuda; chosen if not given)."""
    batch_size: int | None = None
    """dense, hybrid: texts encoded at a time (64)."""
    alpha: float | None = None
    """hybrid: the weight of dense against bm25 (0.5)."""
    fusion: Literal["minmax", "rrf"] | None = None
    """hybrid: how the two are put together (minmax)."""
    candidates: int | None = None
    """hybrid: how many documents each of the two proposes (100)."""
    k1: float | None = None
    """bm25, hybrid: how fast repeats of a word stop counting (1.5)."""
    b: float | None = None
    """bm25, hybrid: how much long documents are held back (0.75)."""
    language: str | None = None
    """simple, bm25, hybrid: the language of the stemmer (english)."""
    stem: bool | None = None
    """simple, bm25, hybrid: cut words to their stems (true)."""
    stop_words: bool | None = None
    """simple, bm25, hybrid: leave function words out (true)."""
    sublinear: bool | None = None
    """simple: dampen repeats of a word by a logarithm (true)."""


_RETRIEVER_SETTINGS = [field.name for field in dataclasses.fields(Config)][6:]


def main() -> None:
    argv = sys.argv[1:]
    if argv and argv[0] in ("prepare_kb", "build", "search"):
        argv = argv[1:]
    config = load_config(Config, argv, prog="python -m nanochat.retrieval")
    settings = {name: value for name in _RETRIEVER_SETTINGS if (value := getattr(config, name)) is not None}
    if config.search is not None:
        search(config, settings)
    elif config.documents is None or config.output is None:
        raise UserError(
            "give --documents FILE.jsonl --output DIRECTORY to build a knowledge base, "
            'or --search "text" --knowledge_base DIRECTORY to try one; --help lists all settings'
        )
    else:
        build(config.documents, config.output, config.type or "simple", settings)


def build(documents_path: Path, output: Path, retriever_type: str, settings: dict[str, Any]) -> None:
    start = time.perf_counter()
    documents = read_documents(documents_path)
    read = time.perf_counter()
    print0(f"read {len(documents):,} documents from {documents_path} in {read - start:.1f} s")
    knowledge_base = build_knowledge_base(documents, output, retriever_type, **settings)
    seconds = time.perf_counter() - read
    print0(f"built {retriever_type} in {seconds:.1f} s ({len(documents) / seconds:,.0f} documents/s)")
    sizes = {name: entry["size"] / 1e6 for name, entry in knowledge_base.manifest["files"].items()}
    total, text = sum(sizes.values()), sizes["documents.jsonl"]
    print0(f"size {total:.2f} MB: documents {text:.2f} MB, index {total - text:.2f} MB")
    print0(f"wrote {knowledge_base.directory}")
    print0(f'try it: python -m nanochat.retrieval --search "..." --knowledge_base {output}')


def search(config: Config, settings: dict[str, Any]) -> None:
    path = config.knowledge_base or config.output
    if path is None:
        raise UserError("--search needs the knowledge base to look in: --knowledge_base DIRECTORY")
    manager = RetrievalManager(config.type, path, **settings)
    start = time.perf_counter()
    documents = manager.retrieve(config.search, config.top_k)
    milliseconds = 1000 * (time.perf_counter() - start)
    for rank, document in enumerate(documents, 1):
        print0(format_hit(rank, document))
    found = f"{len(documents)} of {len(manager):,} documents" if documents else "nothing found"
    print0(f"{found} ({manager.retriever_type}, {milliseconds:.1f} ms)")


def format_hit(rank: int, document: Document) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    snippet = textwrap.shorten(document.content, 2 * (width - 6), placeholder=" ...")
    lines = textwrap.wrap(snippet, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([f"{rank:>4}. {document.score:.4f}  {document.id}  {_one_line(document.title)}", *lines])


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run_main(main)
