"""A retriever from its type and settings, with a clear word about any that it does not have."""

from __future__ import annotations

import difflib
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.bm25 import BM25Retriever
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.hybrid import HybridRetriever
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.simple import SimpleRetriever

TEXT_SETTINGS = ("language", "stem", "stop_words", "title_weight")
_BM25 = ("k1", "b", "variant", "bm25_backend", *TEXT_SETTINGS)
_DENSE = ("model", "encoder", "device", "batch_size", "dtype", "faiss_index", *TEXT_SETTINGS)
_HYBRID = ("alpha", "fusion", "candidates", "rerank", "rerank_candidates", "reranker")
_SETTINGS = {
    "simple": (*TEXT_SETTINGS, "sublinear"),
    "bm25": _BM25,
    "dense": _DENSE,
    "hybrid": tuple(dict.fromkeys((*_HYBRID, *_BM25, *_DENSE))),
}
RETRIEVER_TYPES = tuple(_SETTINGS)


def setting_names(retriever_type: str) -> tuple[str, ...]:
    if retriever_type not in _SETTINGS:
        near = difflib.get_close_matches(str(retriever_type), RETRIEVER_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"no retriever type {retriever_type!r}; use one of {', '.join(RETRIEVER_TYPES)}{hint}")
    return _SETTINGS[retriever_type]


def create_retriever(retriever_type: str, **settings: Any) -> Retriever:
    """An empty retriever: simple, bm25, dense or hybrid."""
    names = setting_names(retriever_type)
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(names)}"
            raise UserError(f"the retriever {retriever_type!r} has no setting {name!r}{hint}")
    if retriever_type == "simple":
        return SimpleRetriever(**settings)
    if retriever_type == "bm25":
        return BM25Retriever(**settings)
    if retriever_type == "dense":
        return DenseRetriever(**settings)
    own, bm25, dense = (
        {name: settings[name] for name in part if name in settings} for part in (_HYBRID, _BM25, _DENSE)
    )
    return HybridRetriever(BM25Retriever(**bm25), DenseRetriever(**dense), **own)
