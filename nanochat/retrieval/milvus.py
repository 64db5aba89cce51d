"""A knowledge base inside Milvus (https://milvus.io), for more documents than one machine should hold.

    MilvusRetriever("data/big.db")                    an embedded file (milvus-lite): one process, to try it out
    MilvusRetriever("http://10.0.0.7:19530")          a server or a cluster: the same code

Milvus finds candidates, we decide. A document is pushed with its embedding and with a sparse vector of the term part of
its BM25 weights; a query is a sparse vector of its terms' idf, so that the inner product is BM25. Two things make that
product inexact: the mean length of documents moves on after a document was pushed, and terms share the 32-bit numbers
of sparse vectors. Both only bound the true score from above (`_BM25.rank`), so candidates are fetched until no document
left outside can be among the best, and are scored and fused by the code of the retrievers in process: the ranks are
theirs. How many documents have a term stands in a second collection, and N, lengths and settings in a third.

One process writes at a time. A change that was killed half-way is counted again by the next one that writes.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.bm25 import BM25Retriever
from nanochat.retrieval.create import assemble
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.milvus_store import (
    BATCH,
    LONGEST_ID,
    LONGEST_TEXT,
    MOST_FIELDS,
    MOST_RESULTS,
    Filter,
    State,
    Store,
    told,
)
from nanochat.retrieval.postings import hash64
from nanochat.retrieval.segment import dense_text, text_of

_SPARE = 16  # candidates beyond top_k
_ROUNDING = 1e-5  # more than float32 sums differ
_NUMBERS = 4_294_967_291  # a prime below 2^32: the numbers of terms in sparse vectors
_PUSHED = ("search", "k1", "b", "variant", "language", "stem", "stop_words", "title_weight")
_NO_TERM = 4_294_967_292  # for a document without words: an empty vector is refused


class MilvusRetriever:
    type = "milvus"

    def __init__(
        self,
        uri: str | Path,
        collection: str = "documents",
        search: str = "",
        token: str = "",
        dense_index: str = "auto",
        **settings: Any,
    ):
        """uri: a file ending in .db, or a server's address; token: its "user:password" or API key. search: bm25, dense
        or hybrid, fixed with the other settings (of such a retriever) when the first documents come (bm25 if not
        given); afterwards the collection knows them. dense_index: FLAT, HNSW or AUTOINDEX; auto: FLAT in a file, HNSW
        on a server."""
        if not re.fullmatch(r"[A-Za-z_]\w{0,200}", collection, re.ASCII):
            raise UserError(f"the collection is {collection!r}; use letters, digits and _, not beginning with a digit")
        if dense_index not in ("auto", "FLAT", "HNSW", "AUTOINDEX"):
            raise UserError(f"dense_index is {dense_index!r}; it must be auto, FLAT, HNSW or AUTOINDEX")
        self.uri, self.collection, self.dense_index = str(uri), collection, dense_index
        self.store = Store(self.uri, collection, token)
        with self.told():
            state = self.store.state()
        if search:
            settings["search"] = search
        settings = self._agreed(settings, state)
        search = settings.pop("search", "bm25")
        if search not in ("bm25", "dense", "hybrid"):
            raise UserError(f"search is {search!r}; it must be bm25, dense or hybrid")
        if settings.get("bm25_backend", "own") != "own":
            raise UserError("bm25_backend is for a knowledge base in process; leave it out with milvus")
        self._retriever = assemble(search, settings, _BM25, _Dense)
        self._bm25 = getattr(self._retriever, "bm25", self._retriever if search == "bm25" else None)
        self._dense = getattr(self._retriever, "dense", self._retriever if search == "dense" else None)
        self.analyzer = self._retriever.analyzer
        if self._dense is not None and state.embedding and self._dense.encoder_hash != state.embedding["hash"]:
            raise UserError(
                f"{self} was made with another embedding model, {state.embedding['model']!r}, than "
                f"{self._dense.model!r}, and their vectors do not compare; use that one, or another --collection"
            )

    def __str__(self) -> str:
        return f"milvus:{self.uri}#{self.collection}"

    # --- the contract

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Milvus' errors as ours."""
        return told(self, self.store)

    def __len__(self) -> int:
        with self.told():
            return self.store.state().documents

    def search(
        self, queries: list[str], top_k: int = 5, where: dict[str, Any] | None = None, explain: bool = False
    ) -> list[list[Document]]:
        if self._dense is not None:
            _ = self._dense.encoder  # before the copy below, so that it is loaded once
        with self.told():
            return self._retriever.over(_Candidates(self.store)).search(queries, top_k, where, explain)

    def score(self, query: str, ids: list[str]) -> list[float]:
        with self.told():
            return self._retriever.over(_Candidates(self.store)).score(query, ids)

    def get(self, ids: Iterable[str]) -> list[Document | None]:
        ids = list(ids)
        with self.told():
            found = self.store.get(ids)
        return [found.get(id) for id in ids]

    def add(self, documents: Iterable[Document]) -> None:
        """A document whose id is there already replaces it. Written in batches: where one is refused, those before it
        are there."""
        self.push((document, None) for document in documents)

    def push(
        self, pairs: Iterable[tuple[Document, np.ndarray | None]], after: Callable[[State, int], None] | None = None
    ) -> None:
        """Documents with their embeddings, where these are known. after: called with the state and how many there were
        in it after each batch, may note something in the state."""
        pairs, seen = iter(pairs), set()
        with self.told(), self.store.writing(self._settings(), self._terms) as (state, counts):
            while batch := list(islice(pairs, BATCH)):
                documents = [document for document, _ in batch]
                for document in documents:
                    _check(document)
                    if document.id in seen:
                        raise UserError(f"id {document.id!r} occurs twice among the documents to add; make ids unique")
                    seen.add(document.id)
                vectors = self._vectors(batch, state)
                if not self.store.exists:
                    self.store.create(None if vectors is None else vectors.shape[1], self.dense_index)
                old = self.store.get([document.id for document in documents])
                terms = [self._terms(document) for document in documents]
                state.mean_length = state.mean_length or sum(t.total() for t in terms) / len(terms) or 1.0
                of_rows = zip(documents, terms, [None] * len(batch) if vectors is None else vectors, strict=True)
                self.store.upsert([self._row(*of_row, state.mean_length) for of_row in of_rows])
                for document in old.values():
                    state.forget(self._terms(document), counts)
                for of_document in terms:
                    state.learn(of_document, counts)
                if after is not None:
                    after(state, len(batch))
                self.store.write(state)

    def delete(self, ids: Iterable[str]) -> None:
        if isinstance(ids, str):
            raise TypeError("delete takes ids; for one document: delete([id])")
        ids = list(dict.fromkeys(ids))
        with self.told():
            _Candidates(self.store).rows(ids)  # all of them are there, or nothing is done
            with self.store.writing(self._settings(), self._terms) as (state, counts):
                for start in range(0, len(ids), BATCH):
                    some = ids[start : start + BATCH]
                    old = self.store.get(some)
                    self.store.delete(some)
                    for document in old.values():
                        state.forget(self._terms(document), counts)

    def stats(self) -> dict[str, Any]:
        with self.told():
            state = self.store.state()
            there = self.store.count()
        lengths = {"mean_length": state.length / max(1, state.documents), "mean_length_pushed": state.mean_length}
        return {
            "collection": str(self),
            "documents": state.documents,
            "rows": there,
            **lengths,
            "half_written": state.half_written,
            **self.settings(),
            **{f"embedding {name}": value for name, value in state.embedding.items()},
        }

    def settings(self) -> dict[str, Any]:
        return {"uri": self.uri, "collection": self.collection, **self._settings()}

    # --- parts

    def _agreed(self, settings: dict[str, Any], state: State) -> dict[str, Any]:
        """The collection's settings, and those given now; what was pushed depends on some of them."""
        for name, value in settings.items():
            if name in _PUSHED and state.settings.get(name, value) != value:
                raise UserError(
                    f"{self} was made with {name}={state.settings[name]}, and {name}={value} is asked for; "
                    "leave it out, or use another --collection"
                )
        return {**state.settings, **settings}

    def _settings(self) -> dict[str, Any]:
        return {"search": self._retriever.type, **self._retriever.settings()}

    def _terms(self, document: Document) -> Counter[str]:
        return Counter(self.analyzer.terms(text_of(document, self._retriever.title_weight)))

    def _vectors(self, batch: list[tuple[Document, np.ndarray | None]], state: State) -> np.ndarray | None:
        if self._dense is None:
            return None
        missing = [dense_text(document) for document, vector in batch if vector is None]
        made = iter(self._dense.encoding()(missing)) if missing else iter(())
        vectors = np.stack([next(made) if vector is None else vector for _, vector in batch])
        if not state.embedding:
            hashed = self._dense.encoder_hash
            state.embedding = {"model": self._dense.model, "dimension": vectors.shape[1], "hash": hashed}
        if vectors.shape[1] != state.embedding["dimension"]:
            raise UserError(f"embeddings of {vectors.shape[1]} numbers, {self} has {state.embedding['dimension']}")
        return vectors

    def _row(
        self, document: Document, terms: Counter[str], vector: np.ndarray | None, mean_length: float
    ) -> dict[str, Any]:
        sparse: dict[int, float] = {}
        if self._bm25 is not None:
            weights = self._bm25.term_part(np.array(list(terms.values())), terms.total(), mean_length)
            for term, weight in zip(terms, weights.tolist(), strict=True):
                number = hash64(term) % _NUMBERS
                sparse[number] = max(weight, sparse.get(number, 0.0))
        return {
            "id": document.id,
            "title": document.title,
            "content": document.content,
            "source": document.source,
            "metadata": document.metadata,
            "fields": Filter.fields(document),
            "sparse": sparse or {_NO_TERM: 1.0},
            **({} if vector is None else {"dense": vector.tolist()}),
        }


def _check(document: Document) -> None:
    for name in ("id", "title", "content", "source"):
        size, most = len(getattr(document, name).encode()), LONGEST_ID if name == "id" else LONGEST_TEXT
        if size > most:
            raise UserError(
                f"document {document.id[:80]!r}: its {name} has {size:,} bytes, and Milvus holds {most:,}; "
                "cut documents into chunks"
            )
    if len(Filter.fields(document)) > MOST_FIELDS:
        raise UserError(f"document {document.id!r} has more than {MOST_FIELDS:,} values in its metadata; shorten them")


# --- searching


class _BM25(BM25Retriever):
    def rank(self, documents: _Candidates, queries: list[str], top_k: int, masks: Filter) -> list:
        state = documents.state
        # A term part f / (f + a + c L / m) grows with the mean length m, by no more than the mean itself did.
        growth = max(1.0, state.mean_now / (state.mean_length or 1.0)) * (1 + _ROUNDING)
        vectors = []
        for query in queries:
            vectors.append({})
            for hashed, weight in zip(*self._of_query(documents, query), strict=True):
                number = hashed % _NUMBERS  # of two terms with one number, both weights count: more, not less
                vectors[-1][number] = vectors[-1].get(number, 0.0) + weight
        return documents.settle(
            "sparse",
            vectors,
            top_k,
            masks,
            lambda at, rows: self._scores(documents, queries[at], rows),
            lambda distance: distance * growth,
        )

    def score_rows(self, documents: _Candidates, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        return [self._scores(documents, *pair) for pair in zip(queries, rows, strict=True)]

    def _of_query(self, documents: _Candidates, query: str) -> tuple[list[int], list[float]]:
        """Hashes and weights of the query's known terms, in the order in which scores are added up always."""
        counts = Counter(self.analyzer.terms(query))
        hashes = {hash64(term): count for term, count in counts.items()}
        known = documents.frequencies(hashes)
        idf = {hashed: self.idf(n, documents.state.documents) for hashed, n in known.items() if n}
        order = sorted(idf, key=lambda hashed: (-idf[hashed], hashed))
        weights = self.query_weights([idf[h] for h in order], [hashes[h] for h in order])
        kept = [(h, weight) for h, weight in zip(order, weights, strict=True) if weight > 0]
        return [h for h, _ in kept], [weight for _, weight in kept]

    def _scores(self, documents: _Candidates, query: str, rows: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(rows))
        of_rows = [documents.terms(row, self) for row in rows.tolist()]
        lengths = np.array([length for _, length in of_rows], dtype=np.int64)
        for hashed, weight in zip(*self._of_query(documents, query), strict=True):
            counts = np.array([terms.get(hashed, 0) for terms, _ in of_rows], dtype=np.int64)
            has = counts > 0
            sums[has] += weight * self.term_part(counts[has], lengths[has], documents.state.mean_now)
        return sums


class _Dense(DenseRetriever):
    def rank(self, documents: _Candidates, queries: list[str], top_k: int, masks: Filter) -> list:
        vectors = self.encode_queries(queries)
        return documents.settle(
            "dense",
            [vector.tolist() for vector in vectors],
            top_k,
            masks,
            lambda at, rows: documents.products(rows, vectors[at]),
            lambda distance: distance + _ROUNDING,
        )

    def score_rows(self, documents: _Candidates, queries: list[str], rows: list[np.ndarray]) -> list[np.ndarray]:
        pairs = zip(rows, self.encode_queries(queries), strict=True)
        return [documents.products(of_query, vector) for of_query, vector in pairs]


class _Candidates:
    """What one search has fetched, numbered in the order in which it came; stands where a Collection does."""

    segments = ()

    def __init__(self, store: Store):
        self.store, self.state = store, store.state()
        self._documents: list[Document] = []
        self._vectors: list[Any] = []
        self._terms: dict[int, tuple[dict[int, int], int]] = {}
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return self.state.documents

    def __getitem__(self, row: int) -> Document:
        document = self._documents[row]
        return Document(document.id, document.title, document.content, document.source, dict(document.metadata))

    def masks(self, where: dict[str, Any] | None = None) -> Filter:
        return Filter(where)

    def best(self, rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        order = sorted(range(len(rows)), key=lambda at: (-scores[at], self._documents[rows[at]].id))[:k]
        return rows[order], scores[order]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        ids = list(ids)
        found = self.store.get(ids, vectors=True)
        unknown = [id for id in ids if id not in found]
        if unknown:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise UserError(f"{len(unknown)} of {len(ids)} ids are not in the collection: {shown}; nothing was done")
        return np.array([self._take(found[id]) for id in ids], dtype=np.int64)

    def settle(
        self,
        part: str,
        vectors: list[Any],
        top_k: int,
        allowed: Filter,
        exact: Callable[[int, np.ndarray], np.ndarray],
        bound: Callable[[float], float],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, scores) of the best for each vector, by their exact scores; bound: no more has a document that Milvus
        puts behind one of this distance."""
        nothing = (np.zeros(0, dtype=np.int64), np.zeros(0))
        found: list[tuple[np.ndarray, np.ndarray]] = [nothing] * len(vectors)
        asked, n = [at for at, vector in enumerate(vectors) if len(vector)], min(top_k + _SPARE, MOST_RESULTS)
        while asked:
            again = []
            for at, hits in zip(asked, self.store.search(part, [vectors[at] for at in asked], n, allowed), strict=True):
                taken = [self._take(document) for document, _ in hits if allowed.passes(document)]
                rows = np.array(taken, dtype=np.int64)
                scores = exact(at, rows)
                if part == "sparse":
                    rows, scores = rows[scores > 0], scores[scores > 0]
                found[at] = self.best(rows, scores, top_k)
                outside = bound(hits[-1][1]) if len(hits) == n < MOST_RESULTS else -np.inf
                if outside > -np.inf and (len(found[at][1]) < top_k or found[at][1][-1] <= outside):
                    again.append(at)
            asked, n = again, min(4 * n, MOST_RESULTS)
        return found

    def _take(self, document: Document) -> int:
        row = self._rows.setdefault(document.id, len(self._documents))
        if row == len(self._documents):
            self._vectors.append(document.explanation.pop("vector", None))
            self._documents.append(document)
        return row

    def products(self, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros(0)
        vectors = np.array([self._vectors[row] for row in rows.tolist()], dtype=np.float32).astype(np.float64)
        return np.einsum("nd,d->n", vectors, vector.astype(np.float64))

    def terms(self, row: int, retriever: BM25Retriever) -> tuple[dict[int, int], int]:
        """How often a document has each term, by hash, and how long it is."""
        if row not in self._terms:
            terms = retriever.analyzer.terms(text_of(self._documents[row], retriever.title_weight))
            self._terms[row] = {hash64(term): count for term, count in Counter(terms).items()}, len(terms)
        return self._terms[row]

    def frequencies(self, hashes: Iterable[int]) -> dict[int, int]:
        return self.store.frequencies(hashes, self.state)
