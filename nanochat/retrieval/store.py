"""The documents under a retriever: JSON lines behind an array of offsets, parsed when they are asked for.

A document is known by its row. In memory and on disk the store is the same thing, one run of bytes and its offsets;
opened from disk the bytes are mapped, so a base of any size opens at once and only the documents that are shown are
ever read.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.document import Document


class DocumentStore:
    """Never changed in place: `append` and `keep` give a new store, so that a search under way keeps its rows."""

    def __init__(
        self, data: bytes | mmap.mmap = b"", offsets: np.ndarray | None = None, id_rank: np.ndarray | None = None
    ):
        self._data = data
        self.offsets = np.zeros(1, dtype=np.int64) if offsets is None else offsets  # (rows + 1,) where each line begins
        self._id_rank = id_rank

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> DocumentStore:
        return cls().append(list(documents))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Document:
        record = json.loads(self._data[self.offsets[row] : self.offsets[row + 1]])
        return Document(
            record["id"], record["title"], record["content"], record.get("source", ""), record.get("metadata", {})
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """id -> row. Reads every document once, so only what needs it pays: adding, deleting, scoring by id."""
        return {document.id: row for row, document in enumerate(self)}

    @cached_property
    def id_rank(self) -> np.ndarray:
        """(rows,) the place of each row when sorted by id: equal scores are ordered by it."""
        if self._id_rank is not None:
            return self._id_rank
        rows = [self._row_of[id] for id in sorted(self._row_of)]
        rank = np.empty(len(rows), dtype=np.int32)
        rank[rows] = np.arange(len(rows), dtype=np.int32)
        return rank

    def __contains__(self, id: str) -> bool:
        return id in self._row_of

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        ids = list(ids)
        unknown = [id for id in ids if id not in self._row_of]
        if unknown:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise UserError(
                f"{len(unknown)} of {len(ids)} ids are not in the knowledge base: {shown}; nothing was done"
            )
        return np.array([self._row_of[id] for id in ids], dtype=np.int64)

    def append(self, documents: list[Document]) -> DocumentStore:
        lines = [
            json.dumps(document.to_dict(with_score=False), ensure_ascii=False).encode() + b"\n"
            for document in documents
        ]
        lengths = np.array([len(line) for line in lines], dtype=np.int64)
        offsets = np.concatenate([self.offsets, self.offsets[-1] + np.cumsum(lengths)])
        store = DocumentStore(b"".join([self._data[:], *lines]), offsets)
        # the ids are at hand here: no line is parsed for them again
        first = len(self)
        new_rows = {document.id: first + index for index, document in enumerate(documents)}
        store.__dict__["_row_of"] = {**(self._row_of if first else {}), **new_rows}
        return store

    def keep(self, mask: np.ndarray) -> DocumentStore:
        """Only the rows where mask is true, in the same order."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        runs = [(self.offsets[start], self.offsets[end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
        lengths = np.diff(self.offsets)[mask]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return DocumentStore(b"".join(self._data[start:end] for start, end in runs), offsets)

    def save(self, directory: Path) -> None:
        (directory / "documents.jsonl").write_bytes(self._data[:])
        np.save(directory / "offsets.npy", self.offsets)
        np.save(directory / "id_rank.npy", self.id_rank)

    @classmethod
    def load(cls, directory: Path) -> DocumentStore:
        path = directory / "documents.jsonl"
        with open(path, "rb") as file:
            # an empty file cannot be mapped
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        offsets = load_array(directory / "offsets.npy")
        if offsets.ndim != 1 or len(offsets) == 0 or offsets[-1] != len(data):
            raise ValueError(f"{directory / 'offsets.npy'} does not fit {path.name}")
        return cls(data, offsets, load_array(directory / "id_rank.npy"))


def load_array(path: Path) -> np.ndarray:
    """A saved array, mapped: read from disk as it is used. Plain ndarray, since np.memmap is slow to slice."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError:
        return np.load(path, allow_pickle=False)  # an array without elements cannot be mapped
