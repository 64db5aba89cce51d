"""A trained search index as a retriever: a document's score is its probability among those that may be found.

    retriever = DSIRetriever(index="models/index")  # a nanochat.dsi.index.SearchIndex, or its folder
    retriever.add(documents)
    retriever.search(["when was the bridge built?"], top_k=5)

Documents that the index does not know are learned when they are added, with old ones rehearsed in each step; what was
forgotten is measured and said. Those that are deleted, and those that a filter forbids, leave the tree of ids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError, print0
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.training import learn
from nanochat.retrieval.collection import Collection, Masks, NewDirectory
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.segment import Encode

FOLDER = "dsi"


class DSIRetriever(Retriever):
    type = "dsi"

    def __init__(
        self,
        index: SearchIndex | str | Path | None = None,
        epochs: int = 100,
        device: str | None = None,
        **text: Any,
    ):
        """index: a trained one, or its folder (scripts.dsi_train); a base that is read has its own. epochs: how often
        each new document is seen when it is learned. text: how texts become words, see Retriever."""
        super().__init__(**text)
        if epochs < 0:
            raise UserError(f"epochs is {epochs}; it must be 0 or more")
        self.epochs = epochs
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        given = isinstance(index, SearchIndex) or index is None
        self.index: SearchIndex | None = index if given else SearchIndex.load(Path(index), self.device)
        self._among: tuple[Collection, dict[bytes, frozenset[str]]] | None = None

    def settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {"epochs": self.epochs}
        if self.index is not None:  # another one finds other documents
            digest = hashlib.sha256()
            for name, tensor in sorted(self.index.model.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
            own["index_hash"] = digest.hexdigest()[:16]
        return {**super().settings(), **own}

    # --- what is found

    def _known(self, documents: Collection, masks: Masks) -> frozenset[str]:
        """Documents of the collection that the index knows and the masks allow."""
        if self._among is None or self._among[0] is not documents:
            self._among = documents, {}
        key = b"/".join(np.asarray(mask).tobytes() for mask in masks)
        if key not in self._among[1]:
            self._among[1][key] = frozenset(
                id for id in self._index.ids.sequences if _allowed(documents, masks, documents.row_of(id))
            )
        return self._among[1][key]

    @property
    def _index(self) -> SearchIndex:
        if self.index is None:
            raise UserError(
                "the retriever 'dsi' needs a trained index: python -m scripts.dsi_train, then --index FOLDER"
            )
        return self.index

    def rank(
        self, documents: Collection, queries: list[str], top_k: int, masks: Masks
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        ranked = []
        for found in self._index.search(queries, top_k, self._known(documents, masks)):
            rows = np.array([documents.row_of(id) for id, _ in found], dtype=np.int64)
            scores = np.array([math.exp(score) for _, score in found])
            ranked.append(documents.best(rows, scores, top_k))
        return ranked

    @torch.no_grad()
    def score_rows(self, documents: Collection, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        """0 for what the index does not know."""
        known, scored = self._known(documents, documents.masks(None)), []
        for query, wanted in zip(queries, rows, strict=True):
            scores = np.zeros(len(wanted))
            there = [(at, id) for at, row in enumerate(wanted.tolist()) if (id := documents[row].id) in known]
            if there:
                found = self._index.log_probs([query] * len(there), [id for _, id in there], known)
                scores[[at for at, _ in there]] = found.exp().cpu().numpy()
            scored.append(scores)
        return scored

    # --- the contract

    def add(
        self, documents: Iterable[Document], new_directory: NewDirectory | None = None, encode: Encode | None = None
    ) -> None:
        index = self._index
        before = {id for id in index.ids.sequences if id in self.documents}
        super().add(documents, new_directory, encode)
        collection = self.documents
        everything = [segment.documents[row] for segment in collection.segments for row in segment.live_rows().tolist()]
        new = [document for document in everything if document.id not in index.ids.sequences]
        if new and self.epochs:
            old = [document for document in everything if document.id in before]
            print0(learn(index, new, old, self.epochs))

    def save_beside(self, directory: Path) -> None:
        folder = directory / FOLDER
        folder.mkdir()
        self._index.save(folder)
        # safetensors makes its file private; others may read a knowledge base
        (folder / "index.safetensors").chmod((folder / "index.json").stat().st_mode & 0o777)

    def load_beside(self, directory: Path) -> None:
        self._among = None
        if self.index is None and (directory / FOLDER).exists():
            self.index = SearchIndex.load(directory / FOLDER, self.device)


def _allowed(documents: Collection, masks: Masks, row: int) -> bool:
    if row < 0:
        return False
    number = int(np.searchsorted(documents.first_rows, row, side="right")) - 1
    mask = masks[number]
    return not len(mask) or bool(mask[row - documents.first_rows[number]])
