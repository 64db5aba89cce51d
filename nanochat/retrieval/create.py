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
_DENSE = ("model", "encoder", "device", "batch_size", "dtype", "faiss_index", "faiss_gpu", *TEXT_SETTINGS)
_HYBRID = ("alpha", "fusion", "candidates", "rerank", "rerank_candidates", "reranker")
_SETTINGS = {
    "simple": (*TEXT_SETTINGS, "sublinear"),
    "bm25": _BM25,
    "dense": _DENSE,
    "hybrid": tuple(dict.fromkeys((*_HYBRID, *_BM25, *_DENSE))),
    "kg": ("fact_retriever", "max_hops", "hub_degree", "max_facts", "threshold", "device", *TEXT_SETTINGS),
    "dsi": ("index", "epochs", "device", *TEXT_SETTINGS),
}
RETRIEVER_TYPES = tuple(_SETTINGS)  # over a knowledge base
_SETTINGS["milvus"] = ("uri", "collection", "search", "token", "dense_index", *_SETTINGS["hybrid"])
_SETTINGS["client"] = ("url", "timeout", "queries_at_once")
ELSEWHERE = ("milvus", "client")  # their documents are not in a knowledge base of ours


def setting_names(retriever_type: str) -> tuple[str, ...]:
    if retriever_type not in _SETTINGS:
        near = difflib.get_close_matches(str(retriever_type), _SETTINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"no retriever type {retriever_type!r}; use one of {', '.join(_SETTINGS)}{hint}")
    return _SETTINGS[retriever_type]


def create_retriever(retriever_type: str, **settings: Any) -> Any:
    """A retriever: simple, bm25, dense, hybrid, kg and dsi are empty; milvus and client have what is there."""
    names = setting_names(retriever_type)
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(names)}"
            raise UserError(f"the retriever {retriever_type!r} has no setting {name!r}{hint}")
    if retriever_type == "simple":
        return SimpleRetriever(**settings)
    if retriever_type == "kg":
        from nanochat.kg.retriever import KGRetriever

        return KGRetriever(**settings)
    if retriever_type == "dsi":
        from nanochat.dsi.retriever import DSIRetriever

        return DSIRetriever(**settings)
    if retriever_type == "milvus":
        from nanochat.retrieval.milvus import MilvusRetriever

        return MilvusRetriever(**settings)
    if retriever_type == "client":
        from nanochat.retrieval.client import RetrievalClient

        return RetrievalClient(**settings)
    return assemble(retriever_type, settings)


def assemble(
    retriever_type: str,
    settings: dict[str, Any],
    bm25: type[BM25Retriever] = BM25Retriever,
    dense: type[DenseRetriever] = DenseRetriever,
) -> Retriever:
    """bm25, dense, or both of them as hybrid, of these classes."""
    own, of_bm25, of_dense = (
        {name: settings[name] for name in part if name in settings} for part in (_HYBRID, _BM25, _DENSE)
    )
    if retriever_type == "bm25":
        return bm25(**of_bm25)
    if retriever_type == "dense":
        return dense(**of_dense)
    return HybridRetriever(bm25(**of_bm25), dense(**of_dense), **own)
