"""Hybrid retrieval: BM25 and dense vectors together.

The candidates are the best 100 of both. Every candidate is scored exactly by both (a document missing from one list did
not score zero there), each retriever's scores are scaled to 0..1 over all candidates, and the two are mixed:

    score = alpha * dense + (1 - alpha) * bm25

Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval" (2023). `fusion="rrf"` adds up reciprocal
ranks instead, 1 / (60 + rank): Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion" (2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.bm25 import BM25Retriever
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever, best_rows
from nanochat.retrieval.store import DocumentStore

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
    ):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}; it is the weight of dense, between 0 and 1")
        if fusion not in ("minmax", "rrf"):
            raise UserError(f"fusion is {fusion!r}; it must be minmax or rrf")
        if candidates < 1:
            raise UserError(f"candidates is {candidates}; it must be at least 1")
        self.bm25 = BM25Retriever() if bm25 is None else bm25
        self.dense = DenseRetriever() if dense is None else dense
        self.parts: tuple[Retriever, Retriever] = (self.bm25, self.dense)
        self.alpha, self.fusion, self.candidates = alpha, fusion, candidates

    # --- searching

    def rank(self, queries: list[str], top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        n = min(max(self.candidates, top_k), len(self.documents))
        lists = [[rows for rows, _ in part.rank(queries, n)] for part in self.parts]
        rows = [np.union1d(*both) for both in zip(*lists, strict=True)]
        if self.fusion == "rrf":
            scores = [_reciprocal_ranks(of_query, both) for of_query, *both in zip(rows, *lists, strict=True)]
        else:
            scores = self.score_rows(queries, rows)
        return [best_rows(*pair, top_k, self.documents.id_rank) for pair in zip(rows, scores, strict=True)]

    def score_rows(self, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """Fused scores, the documents given being the candidates."""
        bm25, dense = (part.score_rows(queries, rows) for part in self.parts)
        if self.fusion == "minmax":
            return [self.alpha * _scaled(d) + (1 - self.alpha) * _scaled(s) for s, d in zip(bm25, dense, strict=True)]
        fused = []
        for of_query, s, d in zip(rows, bm25, dense, strict=True):
            matching = s > 0  # bm25 lists no others
            lists = [(of_query[matching], s[matching]), (of_query, d)]
            ranked = [best_rows(*pair, len(of_query), self.documents.id_rank)[0] for pair in lists]
            fused.append(_reciprocal_ranks(of_query, ranked))
        return fused

    # --- the parts stand on the same documents

    def share_documents(self, documents: DocumentStore) -> None:
        super().share_documents(documents)
        for part in self.parts:
            part.share_documents(documents)

    def prepare(self, documents: Iterable[Document]) -> tuple[Any, Any]:
        documents = list(documents)
        return self.bm25.prepare(documents), self.dense.prepare(documents)

    def append_index(self, prepared: tuple[Any, Any]) -> None:
        for part, of_part in zip(self.parts, prepared, strict=True):
            part.append_index(of_part)

    def keep_index(self, mask: np.ndarray) -> None:
        for part in self.parts:
            part.keep_index(mask)

    def save_index(self, directory: Path) -> None:
        for part in self.parts:
            part.save_index(directory)

    def load_index(self, directory: Path) -> None:
        for part in self.parts:
            part.load_index(directory)

    def embedding_info(self) -> dict[str, Any]:
        return self.dense.embedding_info()

    def settings(self) -> dict:
        own = {"alpha": self.alpha, "fusion": self.fusion, "candidates": self.candidates}
        return {**self.bm25.settings(), **self.dense.settings(), **own}


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
