"""Hybrid retrieval: BM25 and dense vectors together.

The candidates are the best 100 of both. Every candidate is scored exactly by both (a document missing from one list did
not score zero there), each retriever's scores are scaled to 0..1 over all candidates, and the two are mixed:

    score = alpha * dense + (1 - alpha) * bm25

Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval" (2023). `fusion="rrf"` adds up reciprocal
ranks instead, 1 / (60 + rank): Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion" (2009).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.bm25 import BM25Retriever
from nanochat.retrieval.collection import Collection, Masks
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.rerank import CrossEncoderReranker
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.segment import Encode

_RRF_CONSTANT = 60


class HybridRetriever(Retriever):
    type = "hybrid"

    def __init__(
        self,
        bm25: BM25Retriever | None = None,
        dense: DenseRetriever | None = None,
        alpha: float = 0.5,
        fusion: str = "minmax",
        candidates: int = 100,
        rerank: str = "",
        rerank_candidates: int = 30,
        reranker: Any = None,
    ):
        """rerank: a cross-encoder by name or folder, which puts the best `rerank_candidates` in its own order; or our
        own model (nanochat.retrieval.lm_rerank): self, self:SOURCE or self:SOURCE/TAG.
        reranker: an object with score(query, documents) -> array, in place of one."""
        self.bm25 = BM25Retriever() if bm25 is None else bm25
        super().__init__(self.bm25.language, self.bm25.stem, self.bm25.stop_words, self.bm25.title_weight)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}; it is the weight of dense, between 0 and 1")
        if fusion not in ("minmax", "rrf"):
            raise UserError(f"fusion is {fusion!r}; it must be minmax or rrf")
        if candidates < 1:
            raise UserError(f"candidates is {candidates}; it must be at least 1")
        self.dense = DenseRetriever() if dense is None else dense
        self.parts: tuple[Retriever, Retriever] = (self.bm25, self.dense)
        if rerank_candidates < 1:
            raise UserError(f"rerank_candidates is {rerank_candidates}; it must be at least 1")
        self.alpha, self.fusion, self.candidates = alpha, fusion, candidates
        self.rerank, self.rerank_candidates, self._reranker = rerank, rerank_candidates, reranker

    @property
    def reranker(self) -> Any:
        if self._reranker is None and self.rerank.partition(":")[0] == "self":
            from nanochat.retrieval.lm_rerank import LMReranker  # has torch with it

            self._reranker = LMReranker(self.rerank, self.dense.device)
        elif self._reranker is None and self.rerank:
            self._reranker = CrossEncoderReranker(self.rerank, self.dense.device)
        return self._reranker

    # --- searching

    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        n = min(max(self.candidates, top_k), len(documents))
        lists = [[rows for rows, _ in part.rank(documents, queries, n, masks)] for part in self.parts]
        rows = [np.union1d(*both) for both in zip(*lists, strict=True)]
        if self.fusion == "rrf":
            scores = [_reciprocal_ranks(of_query, both) for of_query, *both in zip(rows, *lists, strict=True)]
        else:
            scores = self.score_rows(documents, queries, rows)
        if self.reranker is None:
            return [documents.best(*pair, top_k) for pair in zip(rows, scores, strict=True)]
        n = max(top_k, self.rerank_candidates)
        chosen = [documents.best(*pair, n)[0] for pair in zip(rows, scores, strict=True)]
        scored = [
            self.reranker.score(query, [documents[row] for row in of_query.tolist()]) if len(of_query) else np.zeros(0)
            for query, of_query in zip(queries, chosen, strict=True)
        ]
        return [documents.best(*pair, top_k) for pair in zip(chosen, scored, strict=True)]

    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """Fused scores, the documents given being the candidates; not the reranker's."""
        bm25, dense = (part.score_rows(documents, queries, rows) for part in self.parts)
        if self.fusion == "minmax":
            return [self.alpha * _scaled(d) + (1 - self.alpha) * _scaled(s) for s, d in zip(bm25, dense, strict=True)]
        fused = []
        for of_query, s, d in zip(rows, bm25, dense, strict=True):
            matching = s > 0  # bm25 lists no others
            lists = [(of_query[matching], s[matching]), (of_query, d)]
            ranked = [documents.best(*pair, len(of_query))[0] for pair in lists]
            fused.append(_reciprocal_ranks(of_query, ranked))
        return fused

    def explain(
        self, documents: Collection, queries: list[str], ranked: list[tuple[np.ndarray, np.ndarray]], masks: Masks
    ) -> list[list[dict[str, Any]]]:
        n = min(max(self.candidates, max(len(rows) for rows, _ in ranked)), len(documents))
        found: list[list[dict[str, Any]]] = [[{} for _ in rows] for rows, _ in ranked]
        for part in self.parts:
            lists = part.rank(documents, queries, n, masks)
            scores = part.score_rows(documents, queries, [rows for rows, _ in ranked])
            for of_query, (rows, _), (listed, _), of_part in zip(found, ranked, lists, scores, strict=True):
                places = {row: rank for rank, row in enumerate(listed.tolist(), 1)}
                for reasons, row, score in zip(of_query, rows.tolist(), of_part.tolist(), strict=True):
                    rank = {"rank": places[row]} if row in places else {}
                    reasons[part.type] = {**rank, "score": score}
        return found

    # --- the parts stand on the same documents

    def encoding(self) -> Encode | None:
        return self.dense.encoding()

    def use(self, documents: Collection) -> None:
        super().use(documents)
        for part in self.parts:
            part.use(documents)

    def over(self, documents: Collection) -> HybridRetriever:
        twin = copy.copy(self)
        twin.bm25, twin.dense = copy.copy(self.bm25), copy.copy(self.dense)
        twin.parts = (twin.bm25, twin.dense)
        twin.use(documents)
        return twin

    def save(self, directory: str | Path) -> None:
        self.dense.save(directory)

    def load(self, directory: str | Path) -> HybridRetriever:
        self.use(self.dense.load(directory).documents)
        return self

    def embedding_info(self) -> dict[str, Any] | None:
        return self.dense.embedding_info()

    def settings(self) -> dict:
        names = ("alpha", "fusion", "candidates", "rerank", "rerank_candidates")
        own = {name: getattr(self, name) for name in names}
        return {**self.dense.settings(), **self.bm25.settings(), **own}


def _scaled(scores: np.ndarray) -> np.ndarray:
    """To 0..1 over the candidates. Where all are equal: 1 if they match at all, else 0."""
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.full(len(scores), float(high > 0))


def _reciprocal_ranks(rows: np.ndarray, ranked: Iterable[np.ndarray]) -> np.ndarray:
    """Each list adds 1 / (60 + rank) to the documents it has."""
    order = np.argsort(rows)
    scores = np.zeros(len(rows))
    for of_part in ranked:
        place = order[np.searchsorted(rows, of_part, sorter=order)]
        scores[place] += 1 / (_RRF_CONSTANT + 1 + np.arange(len(of_part)))
    return scores
