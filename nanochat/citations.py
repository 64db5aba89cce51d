"""The documents behind an answer: which of them it cites as [n], and the sentence of each that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.metrics import normalize_answer, split_citations, stated_answer
from nanochat.retrieval.chunking import sentences
from nanochat.retrieval.document import Document

Span = tuple[int, int]


@dataclass
class Source:
    """A document that was found for a question."""

    number: int
    """The [n] under which the model sees it."""
    document: Document
    read: bool = True
    """False: it did not fit the model's length, so the model has not seen it."""


def cited_passages(sources: Sequence[Source], question: str, answer: str) -> dict[int, Span]:
    """For each source that the answer cites, by number: start and end of the sentence of its content that says so."""
    cited = set(split_citations(answer)[1])
    found = {}
    for source in sources:
        if source.number in cited:
            passage = find_passage(question, stated_answer(answer), source.document.content)
            if passage is not None:
                found[source.number] = passage
    return found


def find_passage(question: str, answer: str, content: str) -> Span | None:
    """The sentence that has most words of the answer, and among such the one with most of the question; None if none
    has any of the answer."""
    said, asked = set(normalize_answer(answer).split()), set(normalize_answer(question).split())
    best, found = (0, 0), None
    for start, end in sentences(content):
        words = set(normalize_answer(content[start:end]).split())
        shared = len(said & words), len(asked & words)
        if shared[0] and shared > best:
            best, found = shared, (start, end)
    return found
