"""The three collections that a knowledge base is in Milvus, and nothing of how it ranks (nanochat.retrieval.milvus).

NAME          the documents: id, title, content, source, metadata, filter fields, sparse and dense vectors
NAME_terms    how many documents have each term, by its 64-bit hash
NAME_state    one row: N, lengths, settings, embedding model
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import passes
from nanochat.retrieval.postings import hash64
from nanochat.retrieval.store import field_values

MOST_RESULTS = 16_384  # of one query, Milvus' own limit
LONGEST_TEXT = 65_535  # bytes, Milvus' own limit of a string
LONGEST_ID = 1024
MOST_FIELDS = 4096  # of one array, Milvus' own limit
BATCH = 500  # documents read or written at a time
_QUERIES = 64  # asked at a time
_TERMS = 5_000  # counts of terms read or written at a time


class Filter:
    """nanochat.retrieval.filters for Milvus: `expression` lets pass what `passes` will, and perhaps more.

    Every name and value of a document's metadata is a hash in its array of fields, so that no text of a user becomes
    part of an expression; a range narrows by the metadata themselves where its name is plain."""

    def __init__(self, where: dict[str, Any] | None = None):
        self.where = where or {}
        self.expression = " and ".join(self._condition(name, wanted) for name, wanted in self.where.items())

    def passes(self, document: Document) -> bool:
        return passes(document, self.where)

    def _condition(self, name: str, wanted: Any) -> str:
        if not isinstance(wanted, dict):
            options = wanted if isinstance(wanted, (list, tuple, set)) else [wanted]
            return f"array_contains_any(fields, {[_field(name, value) for value in options]})"
        has = f"array_contains(fields, {_field(name)})"
        limits = [(sign, limit) for sign, limit in wanted.items() if sign in _SIGNS and type(limit) in (int, float)]
        if name == "source" or not limits or not re.fullmatch(r"\w+", name, re.ASCII):
            return has
        numbers = " and ".join(f'metadata["{name}"] {_SIGNS[sign]} {limit!r}' for sign, limit in limits)
        return f"({has} and (({numbers}) or array_contains(fields, {_field(name, [])})))"

    @staticmethod
    def fields(document: Document) -> list[int]:
        found = {_field(name, value) for name, value in field_values(document)}
        found |= {_field(name) for name, _ in field_values(document)}
        found |= {_field(name, []) for name, value in document.metadata.items() if isinstance(value, list)}
        return sorted(found)


_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def _field(name: str, *value: Any) -> int:
    """Of a name, or of a name and one of its values; a number is the same whole or not."""
    value = [int(v) if isinstance(v, float) and v.is_integer() else v for v in value]
    return hash64.__wrapped__(json.dumps([name, *value], ensure_ascii=False)) >> 1  # not negative


@dataclass
class State:
    """The one row of the third collection."""

    documents: int = 0
    length: int = 0  # of all documents together, in terms
    mean_length: float = 0.0  # by which documents are pushed: that of the first batch
    changes: int = 0
    half_written: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)  # of which base, and how many of its documents are here

    @property
    def mean_now(self) -> float:
        return self.length / self.documents if self.length else 1.0

    def learn(self, terms: Counter[str], counts: Counter[int]) -> None:
        self.documents, self.length = self.documents + 1, self.length + terms.total()
        counts.update(map(hash64, terms))

    def forget(self, terms: Counter[str], counts: Counter[int]) -> None:
        self.documents, self.length = self.documents - 1, self.length - terms.total()
        counts.subtract(map(hash64, terms))


class Store:
    """The three collections."""

    def __init__(self, uri: str, name: str, token: str):
        self.embedded = not re.match(r"(https?|tcp|unix)://", uri)
        if self.embedded and not uri.endswith(".db"):
            raise UserError(f"milvus at {uri!r}; give a file ending in .db, or an address such as http://HOST:19530")
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # errors tell what goes wrong
        try:
            import pymilvus
        except ImportError:
            raise UserError(
                'pymilvus is missing; pip install "nanochat[milvus]", or from a checkout pip install -e ".[milvus]"'
            ) from None
        for logger in ("pymilvus", "grpc._server"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self.pymilvus, self.uri = pymilvus, uri
        self.documents, self.terms, self.notes = name, f"{name}_terms", f"{name}_state"
        if self.embedded:
            Path(uri).expanduser().parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client = pymilvus.MilvusClient(str(Path(uri).expanduser()) if self.embedded else uri, token=token)
            for collection in (self.documents, self.terms, self.notes):
                if self.client.has_collection(collection):
                    self.client.load_collection(collection)  # whoever had it before may have left it released
        except Exception as error:  # of several kinds, from an address, a lock or a missing milvus-lite
            raise UserError(f"milvus at {uri} does not answer ({reason(error)})") from None
        self._known: tuple[int, dict[int, int]] = (-1, {})

    # --- the state

    def state(self) -> State:
        if not self.client.has_collection(self.notes):
            return State()
        rows = self.client.get(self.notes, ids=[0], output_fields=["state"])
        return State(**rows[0]["state"]) if rows else State()

    def write(self, state: State) -> None:
        row = {"number": 0, "state": dict(vars(state)), "vector": [0.0, 0.0]}
        self.client.upsert(self.notes, [row])

    @contextlib.contextmanager
    def writing(
        self, settings: dict[str, Any], terms_of: Callable[[Document], Counter[str]]
    ) -> Iterator[tuple[State, Counter[int]]]:
        """The state, and counts to be added to the terms' when the change is through; a refused document (UserError)
        ends it in order too. Whatever else goes wrong leaves the state as half written, to be counted again."""
        if not self.client.has_collection(self.notes):
            self._create_small(self.terms, "count")
            self._create_small(self.notes, "state")
        state = self.state()
        counts: Counter[int] = Counter()
        if state.half_written:
            self._count_again(state, counts, terms_of)
        state.settings = settings
        state.half_written = True
        self.write(state)
        refused = None
        try:
            yield state, counts
        except UserError as error:
            refused = error
        self._add_counts(counts)
        state.half_written, state.changes = False, state.changes + 1
        self.write(state)
        if refused is not None:
            raise refused

    def _count_again(self, state: State, counts: Counter[int], terms_of: Callable[[Document], Counter[str]]) -> None:
        self.client.drop_collection(self.terms)
        self._create_small(self.terms, "count")
        state.documents = state.length = 0
        if self.exists:
            names = ["id", "title", "content"]
            rows = self.client.query_iterator(self.documents, batch_size=BATCH, output_fields=names)
            while batch := rows.next():
                for row in batch:
                    state.learn(terms_of(Document(row["id"], row["title"], row["content"])), counts)
            rows.close()

    # --- the terms

    def frequencies(self, hashes: Iterable[int], state: State) -> dict[int, int]:
        """How many documents have each term; what was asked before is remembered until something changes."""
        if self._known[0] != state.changes:
            self._known = (state.changes, {})
        known = self._known[1]
        hashes = list(hashes)
        known.update(self._counts([hashed for hashed in hashes if hashed not in known]))
        return {hashed: known[hashed] for hashed in hashes}

    def _counts(self, hashes: list[int]) -> dict[int, int]:
        found = dict.fromkeys(hashes, 0)
        if not self.client.has_collection(self.terms):
            return found
        for start in range(0, len(hashes), _TERMS):
            ids = [signed(hashed) for hashed in hashes[start : start + _TERMS]]
            for row in self.client.get(self.terms, ids=ids, output_fields=["number", "count"]):
                found[row["number"] % (1 << 64)] = row["count"]
        return found

    def _add_counts(self, changes: Counter[int]) -> None:
        hashes = [hashed for hashed, change in changes.items() if change]
        for start in range(0, len(hashes), _TERMS):
            some = hashes[start : start + _TERMS]
            new = {hashed: count + changes[hashed] for hashed, count in self._counts(some).items()}
            kept = [{"number": signed(h), "count": n, "vector": [0.0, 0.0]} for h, n in new.items() if n > 0]
            gone = [signed(hashed) for hashed, n in new.items() if n <= 0]
            if kept:
                self.client.upsert(self.terms, kept)
            if gone:
                self.client.delete(self.terms, ids=gone)

    # --- the documents

    @property
    def exists(self) -> bool:
        return self.client.has_collection(self.documents)

    def count(self) -> int:
        if not self.exists:
            return 0
        rows = self.client.query(self.documents, output_fields=["count(*)"], consistency_level="Strong")
        return rows[0]["count(*)"]

    def get(self, ids: list[str], vectors: bool = False) -> dict[str, Document]:
        if not self.exists:
            return {}
        found = {}
        for start in range(0, len(ids), BATCH):
            names = self._shown(vectors)
            for row in self.client.get(self.documents, ids=ids[start : start + BATCH], output_fields=names):
                found[row["id"]] = _document(row)
        return found

    def upsert(self, rows: list[dict[str, Any]]) -> None:
        self.client.upsert(self.documents, rows)

    def delete(self, ids: list[str]) -> None:
        self.client.delete(self.documents, ids=ids)

    def search(self, part: str, vectors: list[Any], n: int, allowed: Filter) -> list[list[tuple[Document, float]]]:
        found: list[list[tuple[Document, float]]] = []
        options = {} if part == "sparse" else {"ef": max(64, 2 * n)}
        for start in range(0, len(vectors), _QUERIES):
            answer = self.client.search(
                self.documents,
                data=vectors[start : start + _QUERIES],
                anns_field=part,
                limit=n,
                filter=allowed.expression,
                output_fields=self._shown(vectors=True),
                search_params={"metric_type": "IP", "params": options},
                consistency_level="Strong",
            )
            found += [
                [(_document({**hit["entity"], "id": hit["id"]}), hit["distance"]) for hit in hits] for hits in answer
            ]
        return found

    def _shown(self, vectors: bool) -> list[str]:
        names = ["title", "content", "source", "metadata"]
        return [*names, "dense"] if vectors and self._has_dense else names

    @property
    def _has_dense(self) -> bool:
        if not hasattr(self, "_dense"):
            fields = self.client.describe_collection(self.documents)["fields"]
            self._dense = any(described["name"] == "dense" for described in fields)
        return self._dense

    def create(self, dimension: int | None, dense_index: str) -> None:
        kinds = self.pymilvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kinds.VARCHAR, max_length=LONGEST_ID, is_primary=True)
        for name in ("title", "content", "source"):
            schema.add_field(name, kinds.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field("metadata", kinds.JSON)
        schema.add_field("fields", kinds.ARRAY, element_type=kinds.INT64, max_capacity=MOST_FIELDS)
        schema.add_field("sparse", kinds.SPARSE_FLOAT_VECTOR)
        indexes = self.client.prepare_index_params()
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        if dimension is not None:
            schema.add_field("dense", kinds.FLOAT_VECTOR, dim=dimension)
            kind = ("FLAT" if self.embedded else "HNSW") if dense_index == "auto" else dense_index
            params = {"M": 32, "efConstruction": 80} if kind == "HNSW" else {}
            indexes.add_index("dense", index_type=kind, metric_type="IP", params=params)
        self._create(self.documents, schema, indexes)

    def _create_small(self, name: str, value: str) -> None:
        kinds = self.pymilvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("number", kinds.INT64, is_primary=True)
        schema.add_field(value, kinds.INT64 if value == "count" else kinds.JSON)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=2)  # Milvus wants one
        indexes = self.client.prepare_index_params()
        indexes.add_index("vector", index_type="FLAT", metric_type="IP")
        self._create(name, schema, indexes)

    def _create(self, name: str, schema: Any, indexes: Any) -> None:
        self.client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")

    def drop(self) -> None:
        for name in (self.documents, self.terms, self.notes):
            if self.client.has_collection(name):
                self.client.drop_collection(name)
        self.__dict__.pop("_dense", None)
        self._known = (-1, {})


def _document(row: dict[str, Any]) -> Document:
    document = Document(row["id"], row["title"], row["content"], row["source"], row["metadata"] or {})
    if "dense" in row:
        document.explanation["vector"] = row["dense"]
    return document


@contextlib.contextmanager
def told(place: Any, store: Store) -> Iterator[None]:
    try:
        yield
    except store.pymilvus.MilvusException as error:
        raise UserError(f"{place}: {reason(error)}") from error


def signed(hashed: int) -> int:
    return hashed - (1 << 64) if hashed >= 1 << 63 else hashed


def reason(error: Exception) -> str:
    text = getattr(error, "message", "") or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0][:300]
