"""What every retriever over a document store does the same way: the contract the rest of the project relies on.

    search(queries, top_k)  the best documents for each query, best first, equal scores in the order of their ids
    score(query, ids)       the exact scores of given documents (fusing two retrievers needs it)
    add(documents)          a document whose id is there already replaces it
    delete(ids)
    save(directory), load(directory)

After any adds and deletes the results equal those of a retriever built afresh from the same documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.store import DocumentStore


class Retriever(ABC):
    type = ""

    def __init__(self) -> None:
        self.documents = DocumentStore()

    # --- what a subclass says; documents are rows of the store here

    @abstractmethod
    def rank(self, queries: list[str], top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, scores) of each query's best documents, in order."""

    @abstractmethod
    def score_rows(self, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """The exact scores of given documents, for each query its own."""

    @abstractmethod
    def prepare(self, documents: Iterable[Document]) -> Any:
        """The costly part of adding, which may fail; nothing is changed yet."""

    @abstractmethod
    def append_index(self, prepared: Any) -> None: ...

    @abstractmethod
    def keep_index(self, mask: np.ndarray) -> None: ...

    @abstractmethod
    def save_index(self, directory: Path) -> None: ...

    @abstractmethod
    def load_index(self, directory: Path) -> None: ...

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What is needed to make this retriever again; JSON values only."""

    def share_documents(self, documents: DocumentStore) -> None:
        self.documents = documents

    # --- the contract

    def __len__(self) -> int:
        return len(self.documents)

    def search(self, queries: list[str], top_k: int = 5) -> list[list[Document]]:
        if isinstance(queries, str):
            raise TypeError("search takes a list of queries; for one query: search([query])")
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1")
        asked = [index for index, query in enumerate(queries) if query.strip()]
        results: list[list[Document]] = [[] for _ in queries]
        if len(self.documents) and asked:
            ranked = self.rank([queries[index] for index in asked], min(top_k, len(self.documents)))
            for index, (rows, scores) in zip(asked, ranked, strict=True):
                results[index] = [
                    self._document(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
                ]
        return results

    def _document(self, row: int, score: float) -> Document:
        document = self.documents[row]
        document.score = score
        return document

    def score(self, query: str, ids: list[str]) -> list[float]:
        return self.score_rows([query], [self.documents.rows(ids)])[0].tolist()

    def add(self, documents: Iterable[Document]) -> None:
        documents = list(documents)
        ids = {document.id for document in documents}
        if len(ids) < len(documents):
            seen: set[str] = set()
            twice = next(document.id for document in documents if document.id in seen or seen.add(document.id))
            raise UserError(f"id {twice!r} occurs twice among the documents to add; make ids unique")
        if not documents:
            return
        prepared = self.prepare(documents)
        if len(self.documents):
            replaced = [id for id in ids if id in self.documents]
            if replaced:
                self.delete(replaced)
        store = self.documents.append(documents)
        self.share_documents(store)
        self.append_index(prepared)

    def index(self, documents: DocumentStore) -> None:
        """Build from documents that are in a store already; they are not copied."""
        prepared = self.prepare(documents)
        self.share_documents(documents)
        self.append_index(prepared)

    def delete(self, ids: Iterable[str]) -> None:
        if isinstance(ids, str):
            raise TypeError("delete takes ids; for one document: delete([id])")
        mask = np.ones(len(self.documents), dtype=bool)
        mask[self.documents.rows(ids)] = False
        self.share_documents(self.documents.keep(mask))
        self.keep_index(mask)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.documents.save(directory)
        self.save_index(directory)

    def load(self, directory: str | Path) -> Retriever:
        directory = Path(directory)
        self.share_documents(DocumentStore.load(directory))
        self.load_index(directory)
        return self


def best_rows(
    rows: np.ndarray, scores: np.ndarray, top_k: int, id_rank: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The top_k best, best first, equal scores by id. Without id_rank: no order, and all that tie with the last too."""
    if len(scores) > top_k:
        worst = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        good = scores >= worst
        rows, scores = rows[good], scores[good]
    if id_rank is None:
        return rows, scores
    order = np.lexsort((id_rank[rows], -scores))[:top_k]
    return rows[order], scores[order]
