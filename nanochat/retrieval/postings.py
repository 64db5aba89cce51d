"""The inverted index under `simple` and `bm25`: for each term, the documents that have it and how often.

Compressed sparse rows in NumPy arrays, term by term. Only counts are kept, never weights: a weight depends on the whole
collection (how many documents, how long, how rare the term), so it is computed when a query asks. That is what makes
adding and deleting exact: the arrays become what a fresh build would have made.

    N documents, V different terms, Z postings (pairs of a term and a document that has it)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever, best_rows
from nanochat.retrieval.store import load_array


@dataclass
class Postings:
    terms: list[str]  # (V,) sorted
    starts: np.ndarray  # (V + 1,) int64: the postings of term t are starts[t] : starts[t + 1]
    docs: np.ndarray  # (Z,) int32 rows, ascending within a term
    counts: np.ndarray  # (Z,) how often the term stands in that document
    lengths: np.ndarray  # (N,) int32: terms in each document, repeats counted

    @cached_property
    def term_of(self) -> dict[str, int]:
        return {term: t for t, term in enumerate(self.terms)}

    @classmethod
    def build(cls, texts: Iterable[str], analyzer: Analyzer) -> Postings:
        terms, ids, lengths = analyzer.term_ids(texts)
        order = sorted(range(len(terms)), key=terms.__getitem__)
        place = np.empty(len(terms), dtype=np.int64)
        place[order] = np.arange(len(terms))
        docs = np.repeat(np.arange(len(lengths)), lengths)
        # one integer for (term, document): sorting it groups each pair's repeats, in the order the postings need
        pairs = np.sort(place[ids] * len(lengths) + docs)
        first = np.flatnonzero(np.diff(pairs, prepend=-1))
        counts = np.diff(first, append=len(pairs))
        pairs = pairs[first]
        term_of_pair, docs = np.divmod(pairs, max(len(lengths), 1))
        starts = np.searchsorted(term_of_pair, np.arange(len(terms) + 1))
        return cls([terms[t] for t in order], starts, docs.astype(np.int32), _small(counts), lengths.astype(np.int32))

    def append(self, other: Postings) -> Postings:
        """These documents followed by the other's."""
        terms = sorted(self.term_of.keys() | other.term_of.keys())
        term_of = {term: t for t, term in enumerate(terms)}
        parts = [
            (part, np.array([term_of[term] for term in part.terms], dtype=np.int64), first_row)
            for part, first_row in ((self, 0), (other, len(self.lengths)))
        ]
        sizes = np.zeros(len(terms), dtype=np.int64)
        for part, place, _ in parts:
            sizes[place] += np.diff(part.starts)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        docs = np.empty(starts[-1], dtype=np.int32)
        counts = np.empty(starts[-1], dtype=np.promote_types(self.counts.dtype, other.counts.dtype))
        next_free = starts[:-1].copy()
        for part, place, first_row in parts:
            sizes = np.diff(part.starts)
            target = np.repeat(next_free[place] - part.starts[:-1], sizes) + np.arange(len(part.docs))
            docs[target] = part.docs + np.int32(first_row)
            counts[target] = part.counts
            next_free[place] += sizes
        return Postings(terms, starts, docs, counts, np.concatenate([self.lengths, other.lengths]))

    def keep(self, mask: np.ndarray) -> Postings:
        """Only the documents where mask is true, rows renumbered, terms that none of them has left out."""
        new_row = np.cumsum(mask, dtype=np.int32) - 1
        kept = mask[self.docs]
        kept_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])
        sizes = np.diff(kept_before[self.starts])
        used = sizes > 0
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[used])])
        terms = [self.terms[t] for t in np.flatnonzero(used)]
        return Postings(terms, starts, new_row[self.docs[kept]], _small(self.counts[kept]), self.lengths[mask])

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "terms.txt").write_bytes("".join(term + "\n" for term in self.terms).encode())
        for name in ("starts", "docs", "counts", "lengths"):
            np.save(directory / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, directory: Path) -> Postings:
        terms = (directory / "terms.txt").read_bytes().decode().split("\n")[:-1]
        arrays = {name: load_array(directory / f"{name}.npy") for name in ("starts", "docs", "counts", "lengths")}
        if len(arrays["starts"]) != len(terms) + 1 or arrays["starts"][-1] != len(arrays["docs"]):
            raise ValueError(f"{directory}: its files do not fit together")
        return cls(terms, **arrays)


def _small(counts: np.ndarray) -> np.ndarray:
    """Counts are nearly always below 256: the smallest type that holds them is a quarter of the memory to read."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))


class LexicalRetriever(Retriever):
    """What `simple` and `bm25` share: they differ in how a posting and a query term are weighted."""

    def __init__(self, language: str = "english", stem: bool = True, stop_words: bool = True):
        super().__init__()
        self.language, self.stem, self.stop_words = language, stem, stop_words
        self.analyzer = Analyzer(language, stem, stop_words)
        self.postings = Postings.build([], self.analyzer)

    # --- what a subclass says

    @abstractmethod
    def query_weights(self, terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The weight of each query term (given as term numbers and how often the query has them)."""

    @abstractmethod
    def posting_weights(self, docs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The weight of one term in the documents that have it, so many times each."""

    def collection_changed(self) -> None:
        """Recompute what depends on all documents."""

    # --- searching

    def _query_terms(self, query: str) -> list[tuple[int, float]]:
        """(term number, weight) for the query's known terms, in a fixed order so that sums come out the same always."""
        known = [t for t in map(self.postings.term_of.get, self.analyzer.terms(query)) if t is not None]
        if not known:
            return []
        terms, counts = np.unique(known, return_counts=True)
        return list(zip(terms.tolist(), self.query_weights(terms, counts).tolist(), strict=True))

    def rank(self, queries: list[str], top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        postings = self.postings
        sums = np.zeros(len(self.documents))  # zero again after each query, so that a query costs what it touches
        ranked = []
        for query in queries:
            terms = self._query_terms(query)
            touched = []
            for term, weight in terms:
                of_term = slice(postings.starts[term], postings.starts[term + 1])
                docs = postings.docs[of_term]
                sums[docs] += weight * self.posting_weights(docs, postings.counts[of_term])
                touched.append(docs)
            rows = np.concatenate(touched) if touched else np.zeros(0, dtype=np.int32)
            scores = sums[rows]
            sums[rows] = 0.0
            if len(touched) > 1:  # a document stands here once for each term it has, so at most that many times
                rows, scores = _distinct(*best_rows(rows, scores, top_k * len(touched), None))
            ranked.append(best_rows(rows, scores, top_k, self.documents.id_rank))
        return ranked

    def score_rows(self, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        return [self._score_rows(query, of_query) for query, of_query in zip(queries, rows, strict=True)]

    def _score_rows(self, query: str, rows: np.ndarray) -> np.ndarray:
        postings = self.postings
        sums = np.zeros(len(rows))
        for term, weight in self._query_terms(query):
            start, end = postings.starts[term], postings.starts[term + 1]
            place = start + np.searchsorted(postings.docs[start:end], rows)
            found = (place < end) & (postings.docs[np.minimum(place, end - 1)] == rows)
            sums[found] += weight * self.posting_weights(rows[found], postings.counts[place[found]])
        return sums

    # --- changing

    def prepare(self, documents: Iterable[Document]) -> Postings:
        # the title is part of the text: it often holds the words that the passage only refers to
        return Postings.build((f"{document.title}\n{document.content}" for document in documents), self.analyzer)

    def append_index(self, prepared: Postings) -> None:
        self.postings = self.postings.append(prepared) if len(self.postings.lengths) else prepared
        self.collection_changed()

    def keep_index(self, mask: np.ndarray) -> None:
        self.postings = self.postings.keep(mask)
        self.collection_changed()

    def save_index(self, directory: Path) -> None:
        self.postings.save(directory / self.type)

    def load_index(self, directory: Path) -> None:
        self.postings = Postings.load(directory / self.type)
        self.collection_changed()

    def settings(self) -> dict:
        return {"language": self.language, "stem": self.stem, "stop_words": self.stop_words}


def _distinct(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, first = np.unique(rows, return_index=True)
    return rows, scores[first]
