"""A data set out of one's own files: passages without near-duplicates, and questions about them.

Held-out questions are about other files than those that are trained on; with fewer than ten files, about other
passages.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.common import get_base_dir, print0
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.chunking import chunk, count_words
from nanochat.retrieval.document import Document
from nanochat.retrieval.duplicates import near_duplicates
from nanochat.tokenizer import FILE_NAME, Tokenizer
from tasks.own_files import Text
from tasks.question_writers import Writer

AT_ONCE = 256  # passages that a writer is given


def token_counter() -> tuple[Callable[[Sequence[str]], list[int]], str]:
    """How long texts are: by this base directory's tokenizer, or in words and signs if there is none yet."""
    folder = get_base_dir() / "tokenizer"
    if not (folder / FILE_NAME).exists():
        return count_words, "words and signs, there is no tokenizer yet"
    tokenizer = Tokenizer.load(folder)
    return lambda texts: [len(ids) for ids in tokenizer.encode_batch(list(texts))], f"tokens of {folder}"


def passages(
    texts: Sequence[Text], size: int, overlap: int, count: Callable[[Sequence[str]], list[int]]
) -> tuple[list[Document], int]:
    """Documents of at most `size` tokens, and how many were left out since they repeat another.

    Titled as the text with its section's heading; metadata: file, start and end in the text, page of a PDF."""
    documents = []
    for text in texts:
        starts = [at for at, _ in text.headings]
        found = chunk(text.content, size, overlap, starts, count)
        for number, (start, end) in enumerate(found):
            heading = next((heading for at, heading in reversed(text.headings) if at <= start), "")
            title = text.title if heading.lower() in ("", text.title.lower()) else f"{text.title}: {heading}"
            about = {**text.metadata, "text": text.id, "start": start, "end": end}
            if pages := about.pop("pages", None):
                about["page"] = sum(page <= start for page in pages)
            documents.append(
                Document(
                    f"{text.id}#{number}" if len(found) > 1 else text.id,
                    title,
                    text.content[start:end],
                    text.source,
                    about,
                )
            )
    repeats = near_duplicates([document.content for document in documents])
    return [d for number, d in enumerate(documents) if number not in repeats], len(repeats)


def write_questions(documents: Sequence[Document], write: Writer, count: int) -> list[dict[str, Any]]:
    """Questions of all documents, by the Query contract. One that is asked of two documents is left out where the
    answers differ, and where they are the same both are its gold documents."""
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    told = time.monotonic()
    for start in range(0, len(documents), AT_ONCE):
        some = documents[start : start + AT_ONCE]
        for document, pairs in zip(some, write(some, count), strict=True):
            for question, answer in pairs:
                asked[question].append((document.id, answer))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print0(f"questions: {min(start + AT_ONCE, len(documents)):,} of {len(documents):,} passages")
    queries: list[dict[str, Any]] = []
    for question, found in asked.items():
        if len({answer for _, answer in found}) == 1:
            ids = list(dict.fromkeys(id for id, _ in found))
            queries.append({"id": f"q{len(queries)}", "query": question, "answers": [found[0][1]], "doc_ids": ids})
    return queries


def round_trip(queries: Sequence[dict[str, Any]], manager: RetrievalManager, top_k: int) -> list[dict[str, Any]]:
    """The queries for which the base finds a gold document among the first top_k: others could be about anything
    (Alberti et al., "Synthetic QA Corpora Generation with Roundtrip Consistency", 2019)."""
    kept = []
    for start in range(0, len(queries), 1024):
        some = queries[start : start + 1024]
        found = manager.search([query["query"] for query in some], top_k)
        kept += [q for q, docs in zip(some, found, strict=True) if {d.id for d in docs} & set(q["doc_ids"])]
    return kept


def split(
    queries: Sequence[dict[str, Any]], documents: Sequence[Document], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """train, val and test, a tenth of the files each, or of the passages where files are few; nothing if there are
    fewer than three to divide. A question about files of different parts is left out."""
    by_file = len({d.metadata["text"] for d in documents}) >= 10
    group = {d.id: d.metadata["text"] if by_file else d.id for d in documents}
    groups = sorted({group[query["doc_ids"][0]] for query in queries})
    if len(groups) < 3:
        return {}
    random.Random(seed).shuffle(groups)
    size = max(1, len(groups) // 10)
    names = dict.fromkeys(groups[:size], "val") | dict.fromkeys(groups[size : 2 * size], "test")
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for query in queries:
        part, *others = {names.get(group[id], "train") for id in query["doc_ids"]}
        if not others:
            parts[part].append(query)
    return parts
