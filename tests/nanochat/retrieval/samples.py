"""Documents, queries and an encoder without a model, for the tests of retrievers."""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np

from nanochat.retrieval import Document, RetrievalManager
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.knowledge_base import build_knowledge_base
from nanochat.retrieval.serve import Server

QUERIES = ["baun", "beun caun", "zzz unknown", "baun baun mauun myun dyun", "cyun feun giun houn", ""]


class TinyEncoder:
    """Hashed bags of words: no model, but texts that share words are near each other."""

    name, fingerprint = "tiny", "tiny-1"

    def __init__(self, dimension: int = 64):
        self.dimension = dimension
        self.encoded = 0

    def encode(self, texts: list[str]) -> np.ndarray:
        self.encoded += len(texts)
        vectors = np.full((len(texts), self.dimension), 0.01)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors


_numbers = itertools.count()


@functools.cache
def _milvus_file() -> str:
    return f"{tempfile.mkdtemp()}/kb.db"  # one for all: starting Milvus takes a second


def make(kind: str, **settings):
    retriever_type = kind.split()[0]
    if retriever_type == "milvus":
        search = kind.split()[1]
        if search != "bm25":
            settings.setdefault("encoder", TinyEncoder())
        collection = f"test_{next(_numbers)}"
        return create_retriever("milvus", uri=_milvus_file(), collection=collection, search=search, **settings)
    if retriever_type == "client":
        path = Path(tempfile.mkdtemp()) / "kb"
        build_knowledge_base([], path, "bm25")
        server = Server(RetrievalManager(knowledge_base_path=path), "127.0.0.1", 0, allow_changes=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return create_retriever("client", url=f"http://127.0.0.1:{server.server_port}")
    if retriever_type in ("dense", "hybrid"):
        settings.setdefault("encoder", TinyEncoder())
    if kind == "hybrid rrf":
        settings["fusion"] = "rrf"
    return create_retriever(retriever_type, **settings)


def random_documents(count: int, seed: int = 0, words: int = 60, prefix: str = "d") -> list[Document]:
    """Zipf-like words, so that there are rare and common ones, long and short documents, repeats and equal scores."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"{first}{second}un" for first in "bcdfghjklm" for second in "aeiouy"][:words]
    probability = 1 / np.arange(1, words + 1)
    probability /= probability.sum()
    return [
        Document(
            f"{prefix}{rng.integers(10**6):06d}-{index}",
            " ".join(rng.choice(vocabulary, 2, p=probability)),
            " ".join(rng.choice(vocabulary, rng.integers(1, 30), p=probability)),
        )
        for index in range(count)
    ]


def hits(retriever, queries=tuple(QUERIES), top_k=10):
    return [[(document.id, document.score) for document in found] for found in retriever.search(list(queries), top_k)]


def same(first, second):
    assert [[id for id, _ in found] for found in first] == [[id for id, _ in found] for found in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose([score for _, score in one], [score for _, score in other], rtol=1e-6, atol=1e-7)
