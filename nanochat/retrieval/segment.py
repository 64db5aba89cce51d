"""A segment: some documents with their indexes, never changed but for which of them are deleted.

A knowledge base is a few segments. Adding makes a small new one, deleting marks rows as dead, and both leave the large
ones alone; several small ones are merged into one now and then. Statistics of the collection (how many documents have a
term, how long they are) are sums over the segments less what the dead ones had, so that scores are always those of a
fresh build from the living documents.

    N documents, D width of an embedding
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.common import save_array, save_rows
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.document import Document
from nanochat.retrieval.postings import Postings, hash64, load_array
from nanochat.retrieval.store import DocumentStore, StoreWriter

Encode = Callable[[Sequence[str]], np.ndarray]
ENCODED_AT_ONCE = 4096  # documents whose embeddings are computed and written together


class Segment:
    """embeddings (N, D), of unit length, are None where the base has none. dead: rows, ascending."""

    def __init__(
        self,
        documents: DocumentStore,
        postings: Postings,
        embeddings: np.ndarray | None = None,
        dead: np.ndarray | None = None,
        directory: Path | None = None,
    ):
        self.documents, self.postings, self.embeddings = documents, postings, embeddings
        self.directory = directory  # where its files lie; None: in memory only
        self.faiss: object = None  # made when it is first needed
        self.dead = np.zeros(0, dtype=np.int32) if dead is None else dead
        self.dead_terms = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))  # (terms, how many dead have them)
        self.live: np.ndarray | None = None  # (N,) bool; None: all
        if len(self.dead):
            self.live = np.ones(len(documents), dtype=bool)
            self.live[self.dead] = False

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def living(self) -> int:
        return len(self) - len(self.dead)

    def live_rows(self) -> np.ndarray:
        return np.arange(len(self)) if self.live is None else np.flatnonzero(self.live)

    def dead_length(self) -> int:
        return int(self.postings.lengths[self.dead].sum(dtype=np.int64))

    def without(self, rows: np.ndarray, analyzer: Analyzer, title_weight: int) -> Segment:
        """The same with these rows dead too (they are living ones)."""
        changed = Segment(
            self.documents, self.postings, self.embeddings, np.union1d(self.dead, rows).astype(np.int32), self.directory
        )
        changed.faiss = self.faiss
        terms = [set(analyzer.terms(text_of(self.documents[row], title_weight))) for row in rows.tolist()]
        hashes = np.array([hash64(term) for of_document in terms for term in of_document], dtype=np.uint64)
        found = np.concatenate([np.repeat(*self.dead_terms), self.postings.find(hashes)])
        changed.dead_terms = np.unique(found, return_counts=True)
        return changed

    # --- files

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.documents.save(directory)
        self.postings.save(directory / "postings")
        if self.embeddings is not None:
            save_array(directory / "embeddings.npy", self.embeddings)
        self.save_dead(directory)

    def save_dead(self, directory: Path) -> None:
        if len(self.dead):
            save_array(directory / "dead.npy", self.dead)
            save_array(directory / "dead_terms.npy", np.stack(self.dead_terms))

    @classmethod
    def load(cls, directory: Path) -> Segment:
        documents = DocumentStore.load(directory)
        postings = Postings.load(directory / "postings")
        path = directory / "embeddings.npy"
        embeddings = load_array(path) if path.exists() else None
        for part in (postings.lengths, embeddings):
            if part is not None and len(part) != len(documents):
                raise ValueError(f"{directory}: its files do not fit together")
        dead = np.load(directory / "dead.npy") if (directory / "dead.npy").exists() else None
        segment = cls(documents, postings, embeddings, dead, directory)
        if dead is not None:
            segment.dead_terms = tuple(np.load(directory / "dead_terms.npy"))
        return segment


def text_of(document: Document, title_weight: int) -> str:
    """What the words of a document are taken from: its title counts as often as it stands here."""
    return "\n".join([document.title] * title_weight + [document.content])


def dense_text(document: Document) -> str:
    """What the embedding of a document is of."""
    return f"{document.title}\n{document.content}".strip()


def build_segment(
    documents: Iterable[Document],
    analyzer: Analyzer,
    title_weight: int = 1,
    directory: Path | None = None,
    encode: Encode | None = None,
    limit: int | None = None,
) -> Segment | None:
    """One pass over the documents, at most `limit` of them, in memory that does not grow with their text if there is a
    directory to write to. None if there are no documents."""
    if directory is not None:
        directory.mkdir(parents=True)
    writer = StoreWriter(directory)

    def texts() -> Iterator[str]:
        for document in documents:
            writer.add(document)
            yield text_of(document, title_weight)
            if len(writer) == limit:
                return

    try:
        postings = Postings.build(texts(), analyzer, directory)
        store = writer.finish()
    finally:
        writer.close()
    if not len(store):
        return None
    if directory is not None:
        postings.save(directory / "postings")
        postings = Postings.load(directory / "postings")
        for block in directory.glob("block-*"):
            shutil.rmtree(block)
    segment = Segment(store, postings, directory=directory)
    if encode is not None:
        add_embeddings(segment, encode)
    return segment


def add_embeddings(segment: Segment, encode: Encode) -> None:
    """Compute the embeddings of a segment's documents; into a file, and mapped from it, if it has a directory."""
    N = len(segment)
    pieces = (range(start, min(start + ENCODED_AT_ONCE, N)) for start in range(0, N, ENCODED_AT_ONCE))
    encoded = (encode([dense_text(segment.documents[row]) for row in rows]) for rows in pieces)
    first = next(encoded)
    shape, vectors = (N, first.shape[1]), itertools.chain([first], encoded)
    if segment.directory is not None:
        file = segment.directory / "embeddings.npy"
        save_rows(file, shape, np.float32, vectors)
        segment.embeddings = load_array(file)
        return
    segment.embeddings = np.empty(shape, dtype=np.float32)
    for at, some in enumerate(vectors):
        segment.embeddings[at * ENCODED_AT_ONCE :][: len(some)] = some


def merge_segments(segments: Sequence[Segment], directory: Path | None = None) -> Segment:
    """Their living documents in one segment."""
    if directory is not None:
        directory.mkdir(parents=True)
    writer = StoreWriter(directory)
    try:
        for segment in segments:
            for row in segment.live_rows().tolist():
                writer.add(segment.documents[row])
        store = writer.finish()
    finally:
        writer.close()
    parts = [s.postings if s.live is None else s.postings.keep(s.live) for s in segments]
    merged = Segment(store, Postings.merge(parts), directory=directory)
    if segments[0].embeddings is not None:
        merged.embeddings = np.concatenate([s.embeddings if s.live is None else s.embeddings[s.live] for s in segments])
    if directory is not None:
        merged.postings.save(directory / "postings")
        if merged.embeddings is not None:
            save_array(directory / "embeddings.npy", merged.embeddings)
    return merged
