"""BM25 over our own inverted index, as Lucene computes it, or as Okapi.

For a term that n of N documents have, in a document of length L that has it f times:

    score = idf * f / (f + k1 * (1 - b + b * L / mean length)), summed over the query's terms
    idf   = ln(1 + (N - n + 1/2) / (n + 1/2))              variant="lucene"
          = max(0, ln((N - n + 1/2) / (n + 1/2)))          variant="okapi": a term that half of all have counts nothing

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009); the variants as in Kamphuis et
al., "Which BM25 Do You Mean?" (2020). With Lucene's idf, positive always, a document scores above zero exactly when it
has a term of the query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.collection import Collection, Masks
from nanochat.retrieval.lexical import LexicalRetriever, Terms
from nanochat.retrieval.postings import Postings
from nanochat.retrieval.segment import text_of

_NO_NORMS = np.zeros(0)


class BM25Retriever(LexicalRetriever):
    type = "bm25"

    def __init__(
        self,
        k1: float = 1.5,
        b: float = 0.75,
        variant: str = "lucene",
        bm25_backend: str = "own",
        **text: Any,
    ):
        """bm25_backend: "own", or "rank_bm25", that package's BM25Okapi over all documents in memory (slow; it is here
        to compare with). text: how texts become words, see Retriever."""
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"bm25 with k1={k1}, b={b}; k1 must be at least 0 and b between 0 and 1")
        if variant not in ("lucene", "okapi"):
            raise UserError(f"variant is {variant!r}; it must be lucene or okapi")
        if bm25_backend not in ("own", "rank_bm25"):
            raise UserError(f"bm25_backend is {bm25_backend!r}; it must be own or rank_bm25")
        self.k1, self.b, self.variant, self.bm25_backend = k1, b, variant, bm25_backend
        self._peer = None
        super().__init__(**text)

    def idf(self, n: int, N: int) -> float:
        odds = (N - n + 0.5) / (n + 0.5)
        return math.log1p(odds) if self.variant == "lucene" else math.log(max(1.0, odds))

    def query_weights(self, idf: Sequence[float], counts: Sequence[int]) -> list[float]:
        return [rarity * count for rarity, count in zip(idf, counts, strict=True)]

    def posting_weights(self, terms: Terms) -> list[tuple[np.ndarray, np.ndarray]]:
        mean = terms.mean_length
        return [(self.term_part(part.pairs[:, 0], part.pairs[:, 1], mean), _NO_NORMS) for part in terms.parts]

    def term_part(self, counts: np.ndarray, lengths: np.ndarray | int, mean_length: float) -> np.ndarray:
        """A posting's weight without the idf."""
        return counts / (counts + self.k1 * (1 - self.b + self.b * lengths / mean_length))

    def largest_weight(self, postings: Postings, term: int, terms: Terms) -> float:
        counts = np.array([1, 2, postings.most[term]])
        return float(self.term_part(counts, postings.shortest[term], terms.mean_length).max())

    def settings(self) -> dict:
        own = {"k1": self.k1, "b": self.b, "variant": self.variant, "bm25_backend": self.bm25_backend}
        return {**own, **super().settings()}

    # --- the other backend

    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.bm25_backend == "own":
            return super().rank(documents, queries, top_k, masks)
        pairs = zip(documents.segments, masks, strict=True)
        allowed = np.concatenate([mask if len(mask) else np.ones(len(segment), bool) for segment, mask in pairs])
        ranked = []
        for scores in self._peer_scores(documents, queries):
            rows = np.flatnonzero((scores > 0) & allowed)
            ranked.append(documents.best(rows, scores[rows], top_k))
        return ranked

    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        if self.bm25_backend == "own":
            return super().score_rows(documents, queries, rows)
        found = self._peer_scores(documents, queries)
        return [scores[of_query] for scores, of_query in zip(found, rows, strict=True)]

    def _peer_scores(self, documents: Collection, queries: list[str]) -> list[np.ndarray]:
        """For each query, one score for each row; dead ones score 0."""
        pairs = zip(documents.segments, documents.first_rows, strict=False)
        live = np.concatenate([segment.live_rows() + first for segment, first in pairs])
        if self._peer is None or self._peer[0] is not documents:
            try:
                from rank_bm25 import BM25Okapi
            except ImportError:
                raise UserError("rank-bm25 is missing; pip install rank-bm25 (without it: bm25_backend own)") from None
            texts = (text_of(documents[row], self.title_weight) for row in live.tolist())
            self._peer = documents, BM25Okapi([self.analyzer.terms(text) for text in texts], k1=self.k1, b=self.b)
        found = []
        for query in queries:
            scores = np.zeros(documents.first_rows[-1])
            scores[live] = self._peer[1].get_scores(self.analyzer.terms(query))
            found.append(scores)
        return found
