"""The documents of one segment: JSON lines behind an array of offsets, parsed when they are asked for.

A document is known by its row. In memory and on disk the store is the same thing, one run of bytes and its offsets; a
base of any size opens at once, and only the documents that are shown are ever read. Ids are found by their 64-bit
hashes and checked against the document itself.
"""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, save_array
from nanochat.retrieval.document import Document
from nanochat.retrieval.postings import hash64, load_array

_ARRAYS = ("offsets", "id_hashes", "id_rows", "id_rank", "field_starts", "field_rows")
_PREAD = hasattr(os, "pread")  # not on Windows


class DocumentStore:
    """Never changed. offsets (N + 1,): where each line begins; id_hashes (N,) ascending, id_rows (N,) whose they are;
    id_rank (N,): the place of each row when sorted by id. fields: [name, value] of all metadata, the rows that have
    the i-th being field_rows[field_starts[i] : field_starts[i + 1]]."""

    def __init__(self, data: bytes | _File, arrays: dict[str, np.ndarray], fields: Any, offsets: _File | None = None):
        """offsets: the file that they are mapped from."""
        self._data, self._fields, self._offsets = data, fields, offsets
        self.arrays = arrays
        self._header = len(offsets) - arrays["offsets"].nbytes if offsets else 0  # bytes before the first of them
        self.offsets, self.id_rank = arrays["offsets"], arrays["id_rank"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Document:
        record = json.loads(self._data[slice(*self._place(row))])
        return Document(
            record["id"], record["title"], record["content"], record.get("source", ""), record.get("metadata", {})
        )

    def _place(self, row: int) -> Sequence[int]:
        """Where its line begins and ends; read, not mapped, as the line itself."""
        if self._offsets is None:
            return self.offsets[row : row + 2].tolist()
        at = self._header + 8 * row
        return struct.unpack("=qq", self._offsets[at : at + 16])

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def ids_perhaps_in(self, others: Iterable[DocumentStore]) -> list[str]:
        """The ids whose hashes the others have too: all that they share, and hardly one more."""
        hashes = self.arrays["id_hashes"]
        there = np.zeros(len(self), dtype=bool)
        for other in others:
            theirs = other.arrays["id_hashes"]
            there |= theirs[np.minimum(np.searchsorted(theirs, hashes), len(theirs) - 1)] == hashes
        return [self[row].id for row in self.arrays["id_rows"][there].tolist()]

    def row_of(self, id: str) -> int:
        """-1 if no document has this id."""
        hashes, wanted = self.arrays["id_hashes"], np.uint64(hash64.__wrapped__(id))
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                break
            row = int(self.arrays["id_rows"][place])
            if self[row].id == id:
                return row
        return -1

    @cached_property
    def fields(self) -> dict[str, dict[tuple[bool, Any], list[int]]]:
        """name -> (whether it is a boolean, value) -> fields. Read when a filter first asks."""
        pairs = json.loads(self._fields[:]) if isinstance(self._fields, _File) else self._fields
        found: dict[str, dict[tuple[bool, Any], list[int]]] = {}
        for number, (name, value) in enumerate(pairs):
            found.setdefault(name, {}).setdefault((isinstance(value, bool), value), []).append(number)
        return found

    def rows_with(self, field: int) -> np.ndarray:
        starts = self.arrays["field_starts"]
        return self.arrays["field_rows"][starts[field] : starts[field + 1]]

    def save(self, directory: Path) -> None:
        (directory / "documents.jsonl").write_bytes(self._data[:])
        self._save_rest(directory)

    def _save_rest(self, directory: Path) -> None:
        (directory / "fields.json").write_text(json.dumps(self._fields, ensure_ascii=False), encoding="utf-8")
        for name in _ARRAYS:
            save_array(directory / f"{name}.npy", self.arrays[name])

    @classmethod
    def load(cls, directory: Path) -> DocumentStore:
        arrays = {name: load_array(directory / f"{name}.npy") for name in _ARRAYS}
        data = _File(directory / "documents.jsonl")
        if arrays["offsets"].ndim != 1 or len(arrays["offsets"]) == 0 or arrays["offsets"][-1] != len(data):
            raise ValueError(f"{directory / 'offsets.npy'} does not fit documents.jsonl")
        return cls(data, arrays, _File(directory / "fields.json"), _File(directory / "offsets.npy"))


class StoreWriter:
    """Documents one by one into a store, in memory or in a directory."""

    def __init__(self, directory: Path | None = None):
        self.directory = directory
        self._file = io.BytesIO() if directory is None else open(directory / "documents.jsonl", "wb", 1 << 20)  # noqa: SIM115
        self._offsets = array("q", [0])
        self._ids: list[str] = []
        self._field_numbers: dict[str, int] = {}
        self._field_rows: list[array] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, document: Document) -> None:
        line = document.to_line()
        row = len(self._ids)
        for name, value in field_values(document) if document.source or document.metadata else ():
            key = json.dumps([name, value], ensure_ascii=False)
            number = self._field_numbers.setdefault(key, len(self._field_numbers))
            if number == len(self._field_rows):
                self._field_rows.append(array("i"))
            if not self._field_rows[number] or self._field_rows[number][-1] != row:
                self._field_rows[number].append(row)
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        self._ids.append(document.id)

    def finish(self) -> DocumentStore:
        N = len(self._ids)
        hashes = np.array([hash64.__wrapped__(id) for id in self._ids], dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        for at in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
            if self._ids[order[at]] == self._ids[order[at + 1]]:
                raise UserError(f"id {self._ids[order[at]]!r} occurs twice among the documents to add; make ids unique")
        id_rank = np.empty(N, dtype=np.int32)
        id_rank[sorted(range(N), key=self._ids.__getitem__)] = np.arange(N, dtype=np.int32)
        sizes = [len(rows) for rows in self._field_rows]
        rows = [np.frombuffer(rows, dtype=np.int32) for rows in self._field_rows]
        arrays = {
            "offsets": np.array(self._offsets, dtype=np.int64),
            "id_hashes": hashes[order],
            "id_rows": order.astype(np.int32),
            "id_rank": id_rank,
            "field_starts": np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)]),
            "field_rows": np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32),
        }
        fields = [json.loads(key) for key in self._field_numbers]
        if self.directory is None:
            return DocumentStore(self._file.getvalue(), arrays, fields)
        self._file.close()
        store = DocumentStore(_File(self.directory / "documents.jsonl"), arrays, fields)
        store._save_rest(self.directory)
        return store

    def close(self) -> None:
        self._file.close()


def field_values(document: Document) -> Iterator[tuple[str, Any]]:
    """What filters see: the source, and metadata that are a string, a number or a boolean, or a list of such."""
    if document.source:
        yield "source", document.source
    for name, value in document.metadata.items():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, (str, bool, int, float)):
                yield name, item


class _File:
    """Bytes of a file as a slice. Read, not mapped: pages around each document would stay in memory."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._number = self._file.fileno()
        self._size = os.fstat(self._number).st_size
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> bytes:
        start, stop, _ = span.indices(self._size)
        if _PREAD:
            return os.pread(self._number, stop - start, start)
        with self._lock:
            self._file.seek(start)
            return self._file.read(stop - start)
