"""What `simple` and `bm25` share: words to postings, statistics of the collection, the search over its segments.

They differ in how a posting and a query term are weighted (nanochat.retrieval.scoring has the sums).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat.retrieval import scoring
from nanochat.retrieval.collection import Collection, Masks
from nanochat.retrieval.postings import Postings, hash64
from nanochat.retrieval.retriever import Retriever

_MOST_WORDS = 1_000_000  # whose terms are remembered
_FEW = 64  # queries, which take less time than loading numba


@functools.cache
def _numba_is_there() -> bool:
    return importlib.util.find_spec("numba") is not None


class Terms:
    """Where the terms of words lie, looked up once: a word has a number, and for each segment the arrays below say
    which postings have that number (spans: first and last posting, first and last run). Belongs to one collection."""

    def __init__(self, retriever: LexicalRetriever, collection: Collection):
        self.collection = collection
        # weakly, as it has this: in a circle, files of bases long replaced would stay open until the collector comes by
        self.retriever = weakref.proxy(retriever)
        self.parts = [segment.postings for segment in collection.segments]
        self.dead = [segment.dead_terms for segment in collection.segments]
        self.N = len(collection)
        total = sum(int(s.postings.lengths.sum(dtype=np.int64)) - s.dead_length() for s in collection.segments)
        self.mean_length = total / self.N if total else 1.0
        self.numbers: dict[str, int] = {}  # of words, -1 for those that nothing has
        self.of_term: dict[str, int] = {}
        self.idf: list[float] = []
        self.order: list[tuple[float, int]] = []  # rare terms first, the same whatever the segments are
        room = 1024
        self.spans = [np.zeros((room, 4), dtype=np.int64) for _ in self.parts]
        self.bounds = [np.zeros(room) for _ in self.parts]
        self.weights = retriever.posting_weights(self)
        self.lock = threading.Lock()
        self.rooms = threading.local()

    def number(self, word: str) -> int:
        found = self.numbers.get(word)
        return self._learn(word) if found is None else found

    def _learn(self, word: str) -> int:
        term = self.retriever.analyzer.term(word)
        with self.lock:
            if term is None:
                number = -1
            elif term in self.of_term:
                number = self.of_term[term]
            else:
                number = self.of_term[term] = self._look_up(term)
            self.numbers[word] = number
            if len(self.numbers) >= _MOST_WORDS:
                self.retriever._terms = None  # start anew; searches under way go on with this
        return number

    def _look_up(self, term: str) -> int:
        number, hashed = len(self.idf), np.array([hash64(term)], dtype=np.uint64)
        if self.spans and number == len(self.spans[0]):
            for arrays in (self.spans, self.bounds):
                arrays[:] = [np.concatenate([array, np.zeros_like(array)]) for array in arrays]
        n = 0
        for at, (postings, (dead, dead_counts)) in enumerate(zip(self.parts, self.dead, strict=True)):
            t = int(postings.find(hashed)[0])
            start, end, *_ = self.spans[at][number] = postings.span(t) if t >= 0 else (0, 0, 0, 0)
            self.bounds[at][number] = self.retriever.largest_weight(postings, t, self) if t >= 0 else 0.0
            n += end - start
            place = int(np.searchsorted(dead, t))
            if t >= 0 and place < len(dead) and dead[place] == t:
                n -= int(dead_counts[place])
        if not n:
            return -1
        self.idf.append(self.retriever.idf(n, self.N))
        self.order.append((-self.idf[-1], int(hashed[0])))
        return number

    def of_query(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, weights) of the query's known terms, in the order in which they are added up always."""
        counts: dict[int, int] = {}
        for word in self.retriever.analyzer.words(query):
            number = self.number(word)
            if number >= 0:
                counts[number] = counts.get(number, 0) + 1
        numbers = sorted(counts, key=self.order.__getitem__)
        weights = self.retriever.query_weights([self.idf[n] for n in numbers], [counts[n] for n in numbers])
        used = [i for i, weight in enumerate(weights) if weight > 0]
        if len(used) < len(numbers):
            numbers, weights = [numbers[i] for i in used], [weights[i] for i in used]
        return np.array(numbers, dtype=np.int64), np.array(weights)

    def segments(self, masks: Masks) -> list[scoring.Segment]:
        return [
            scoring.Segment(part.docs, part.runs, part.codes, *of_part, segment.documents.id_rank, mask)
            for part, of_part, segment, mask in zip(
                self.parts, self.weights, self.collection.segments, masks, strict=True
            )
        ]

    def room(self, at: int, compiled: bool) -> scoring.Room:
        """This thread's room for sums over a segment."""
        rooms = self.rooms.__dict__
        if at not in rooms or rooms[at].compiled != compiled:  # one of them: NumPy's takes 8 bytes for each document
            rooms[at] = scoring.Room(len(self.parts[at].lengths), compiled)
        return rooms[at]


class LexicalRetriever(Retriever):
    compiled: bool | None = None  # None: with numba where it is installed, from the 65th query on

    def __init__(self, **text: Any):
        super().__init__(**text)
        self._terms: Terms | None = None
        self._asked = 0

    # --- what a subclass says

    @abstractmethod
    def idf(self, n: int, N: int) -> float:
        """The rarity of a term that n of N documents have."""

    @abstractmethod
    def query_weights(self, idf: Sequence[float], counts: Sequence[int]) -> list[float]:
        """The weight of each term of a query, which has it so many times."""

    @abstractmethod
    def posting_weights(self, terms: Terms) -> list[tuple[np.ndarray, np.ndarray]]:
        """(table, norms) of each segment, as scoring wants them."""

    @abstractmethod
    def largest_weight(self, postings: Postings, term: int, terms: Terms) -> float:
        """No posting of the term weighs more."""

    # --- searching

    def use(self, documents: Collection) -> None:
        super().use(documents)
        self._terms = None

    def _terms_of(self, documents: Collection) -> Terms:
        terms = self._terms
        if terms is None or terms.collection is not documents:
            terms = self._terms = Terms(self, documents)
        return terms

    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        terms = self._terms_of(documents)
        self._asked += len(queries)
        compiled = self._asked > _FEW and _numba_is_there() if self.compiled is None else self.compiled
        segments = terms.segments(masks)
        ranked = []
        for query in queries:
            numbers, weights = terms.of_query(query)
            parts = []
            for at, segment in enumerate(segments):
                spans = terms.spans[at][numbers]
                bounds = terms.bounds[at][numbers] * weights
                k = min(top_k, len(segment.id_rank))
                rows, scores = scoring.best(segment, terms.room(at, compiled), spans, weights, bounds, k, compiled)
                parts.append((rows + documents.first_rows[at], scores))
            ranked.append(documents.merge_best(parts, top_k))
        return ranked

    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        terms = self._terms_of(documents)
        return [self._score_rows(terms, *pair) for pair in zip(queries, rows, strict=True)]

    def _score_rows(self, terms: Terms, query: str, rows: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(rows))
        numbers, weights = terms.of_query(query)
        segments = terms.segments(terms.collection.masks())
        for at, places in enumerate(terms.collection.split(rows)):
            segment, places = segments[at], places[np.argsort(rows[places])]
            within = rows[places] - terms.collection.first_rows[at]
            of_part = np.zeros(len(places))
            for number, weight in zip(numbers.tolist(), weights.tolist(), strict=True):
                found, place = segment.find(terms.spans[at][number], within)
                of_part[found] += weight * segment.weights(segment.codes[place], within[found])
            sums[places] = of_part
        return sums
