"""What every retriever over a collection does the same way: the contract the rest of the project relies on.

    search(queries, top_k)  the best documents for each query, best first, equal scores in the order of their ids
    score(query, ids)       the exact scores of given documents (fusing two retrievers needs it)
    get(ids)                the documents themselves
    add(documents)          a document whose id is there already replaces it
    delete(ids)
    save(directory), load(directory)

After any adds and deletes the results equal those of a retriever built afresh from the same documents.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.collection import Collection, Masks, NewDirectory
from nanochat.retrieval.document import Document
from nanochat.retrieval.segment import Encode, Segment, build_segment

SEGMENT_DOCUMENTS = 2_000_000
"""A build begins a new segment after so many, so that its memory is bounded."""


class Retriever(ABC):
    type = ""

    def __init__(
        self, language: str = "english", stem: bool = True, stop_words: bool = True, title_weight: int = 1
    ) -> None:
        """How texts become words: the stemmer's language, whether words are cut to stems and stop words left out
        (nanochat.retrieval.analysis), how often the words of a title count."""
        if title_weight < 0:
            raise UserError(f"title_weight is {title_weight}; it is how often the title's words count, 0 or more")
        self.language, self.stem, self.stop_words, self.title_weight = language, stem, stop_words, title_weight
        self.analyzer = Analyzer(language, stem, stop_words)
        self.documents = Collection()

    # --- what a subclass says; documents are rows of the collection here

    @abstractmethod
    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, scores) of each query's best documents that the masks allow, in order."""

    @abstractmethod
    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """The exact scores of given documents, for each query its own."""

    def settings(self) -> dict[str, Any]:
        """What is needed to make this retriever again; JSON values only."""
        names = ("language", "stem", "stop_words", "title_weight")
        return {name: getattr(self, name) for name in names}

    def encoding(self) -> Encode | None:
        """Texts of documents to vectors, where the retriever works with such."""
        return None

    def use(self, documents: Collection) -> None:
        """Search this collection from now on."""
        self.documents = documents

    def save_beside(self, directory: Path) -> None:  # noqa: B027, most retrievers have nothing
        """Write what is made of the whole collection, beside the documents that lie in this directory already."""

    def load_beside(self, directory: Path) -> None:  # noqa: B027
        """Read that again; the documents in use are those of this directory."""

    # --- the contract

    def __len__(self) -> int:
        return len(self.documents)

    def search(
        self, queries: list[str], top_k: int = 5, where: dict[str, Any] | None = None, explain: bool = False
    ) -> list[list[Document]]:
        """where: only documents with such metadata (nanochat.retrieval.filters). explain: each document says where each
        part of the retriever had it."""
        if isinstance(queries, str):
            raise TypeError("search takes a list of queries; for one query: search([query])")
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1")
        asked = [index for index, query in enumerate(queries) if query.strip()]
        results: list[list[Document]] = [[] for _ in queries]
        documents = self.documents
        if len(documents) and asked:
            some, k = [queries[index] for index in asked], min(top_k, len(documents))
            masks = documents.masks(where)
            ranked = self.rank(documents, some, k, masks)
            reasons = self.explain(documents, some, ranked, masks) if explain else None
            for place, (index, (rows, scores)) in enumerate(zip(asked, ranked, strict=True)):
                results[index] = [documents[row] for row in rows.tolist()]
                for at, (document, score) in enumerate(zip(results[index], scores.tolist(), strict=True)):
                    document.score = score
                    if reasons:
                        document.explanation = reasons[place][at]
        return results

    def explain(
        self, documents: Collection, queries: list[str], ranked: list[tuple[np.ndarray, np.ndarray]], masks: Masks
    ) -> list[list[dict[str, Any]]]:
        """For each document found, {part: {"rank", "score"}}; the rank is missing where the part did not propose it."""
        return [
            [{self.type: {"rank": rank, "score": score}} for rank, score in enumerate(scores.tolist(), 1)]
            for _, scores in ranked
        ]

    def score(self, query: str, ids: list[str]) -> list[float]:
        documents = self.documents
        return self.score_rows(documents, [query], [documents.rows(ids)])[0].tolist()

    def get(self, ids: Iterable[str]) -> list[Document | None]:
        """The documents of these ids; None for those that are not there."""
        rows = [self.documents.row_of(id) for id in ids]
        return [self.documents[row] if row >= 0 else None for row in rows]

    def over(self, documents: Collection) -> Retriever:
        """The same over another collection; a search under way goes on over this one."""
        twin = copy.copy(self)
        twin.use(documents)
        return twin

    def add(
        self,
        documents: Iterable[Document],
        new_directory: NewDirectory | None = None,
        encode: Encode | None = None,
    ) -> None:
        """new_directory: names the directory of each new segment; without it they are in memory. encode: in place of
        this retriever's own encoding()."""
        changed = self.documents
        for segment in self._segments(iter(documents), new_directory, encode or self.encoding()):
            changed = changed.with_segment(segment, self.analyzer, self.title_weight)
        if changed is not self.documents:
            self.use(changed.merged(new_directory))

    def _segments(
        self, documents: Iterator[Document], new_directory: NewDirectory | None, encode: Encode | None
    ) -> Iterator[Segment]:
        while True:
            directory = new_directory() if new_directory else None
            segment = build_segment(documents, self.analyzer, self.title_weight, directory, encode, SEGMENT_DOCUMENTS)
            if segment is None:
                return
            yield segment

    def delete(self, ids: Iterable[str], new_directory: NewDirectory | None = None) -> None:
        if isinstance(ids, str):
            raise TypeError("delete takes ids; for one document: delete([id])")
        rows = np.unique(self.documents.rows(ids))
        self.use(self.documents.without(rows, self.analyzer, self.title_weight).merged(new_directory))

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.documents.save(directory)
        self.save_beside(directory)

    def load(self, directory: str | Path) -> Retriever:
        self.use(Collection.load(Path(directory)))
        self.load_beside(Path(directory))
        return self
