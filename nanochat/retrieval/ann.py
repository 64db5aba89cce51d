"""Nearest vectors: exact for small segments, FAISS indexes for large ones (Douze et al. 2024, "The Faiss library").

    flat      exact; every vector is compared. Up to 50,000
    hnsw      a graph of neighbours (Malkov and Yashunin 2016), 32 links. Up to 1,000,000
    ivf_sq8   4,096 clusters of vectors with 8 bits a number. Above

What an approximate index misses is measured when it is built and stands in the manifest. Whatever proposes candidates,
their scores are computed exactly afterwards.

    N documents, Q queries, D width of an embedding
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError

KINDS = ("auto", "flat", "hnsw", "ivf_sq8")
_SELECTED = 20_000  # so few allowed documents are compared one by one


def kind_for(N: int, kind: str) -> str:
    if kind != "auto":
        return kind
    return "flat" if N <= 50_000 else "hnsw" if N <= 1_000_000 else "ivf_sq8"


def build(embeddings: np.ndarray, kind: str, gpu: bool = False) -> Any:
    """A FAISS index over unit vectors (N, D), or None for flat."""
    N, D = embeddings.shape
    kind = kind_for(N, kind)
    if kind == "flat" or not N:
        return None
    faiss = _faiss()
    if faiss is None:
        raise UserError(
            f"faiss is missing, which searches {N:,} vectors ({kind}); pip install faiss-cpu "
            "(without it: --faiss_index flat, which compares them all)"
        )
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(D, 32)  # by distance: between unit vectors the same order, and a better graph
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    else:
        clusters = min(4096, max(1, N // 40))
        index = faiss.index_factory(D, f"IVF{clusters},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(8, clusters // 256)
        if gpu:
            index = _gpu(faiss).index_cpu_to_all_gpus(index)
        chosen = np.random.default_rng(0).choice(N, min(N, 64 * clusters), replace=False)
        index.train(np.ascontiguousarray(embeddings[np.sort(chosen)]))
    for start in range(0, N, 1 << 16):  # piece by piece: the vectors may be mapped from disk
        index.add(np.ascontiguousarray(embeddings[start : start + (1 << 16)]))
    return faiss.index_gpu_to_cpu(index) if gpu and kind == "ivf_sq8" else index


def read(path: Path, shape: tuple[int, int]) -> Any:
    faiss = _faiss()
    if faiss is None:
        return None
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
    if (index.ntotal, index.d) != shape:
        raise ValueError(f"{path} does not fit the embeddings")
    return index


def write(index: Any, path: Path) -> None:
    try:
        _faiss().write_index(index, str(path))
    except RuntimeError as error:  # a full disk, say
        raise OSError(f"{path.name} cannot be written: {error}") from None


def nearest(
    index: Any, embeddings: np.ndarray, vectors: np.ndarray, n: int, mask: np.ndarray, gpu: bool = False
) -> list[np.ndarray]:
    """For each of the vectors (Q, D), rows of the n nearest that the mask allows ((N,) bool, or (0,): all), in no
    order; fewer if there are no more, or the index finds no more."""
    allowed = np.flatnonzero(mask) if len(mask) else None
    count = len(embeddings) if allowed is None else len(allowed)
    if count <= n:
        return [np.arange(count) if allowed is None else allowed] * len(vectors)
    faiss = _faiss()
    if allowed is not None and (index is None or count <= _SELECTED):
        return [allowed[rows] for rows in _products(vectors, embeddings[allowed], n)]
    if index is None:
        if faiss is None:
            return _products(vectors, embeddings, n)
        if gpu:
            resources, ip = _gpu(faiss).StandardGpuResources(), faiss.METRIC_INNER_PRODUCT
            return list(faiss.knn_gpu(resources, vectors, np.ascontiguousarray(embeddings), n, metric=ip)[1])
        return list(faiss.knn(vectors, embeddings, n, metric=faiss.METRIC_INNER_PRODUCT)[1])
    wider = {"efSearch": max(64, 2 * n)} if hasattr(index, "hnsw") else {"nprobe": index.nprobe}
    if allowed is not None:
        wider["sel"] = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    settings = (faiss.SearchParametersHNSW if hasattr(index, "hnsw") else faiss.SearchParametersIVF)(**wider)
    found = index.search(vectors, n, params=settings)[1]
    return [rows[rows >= 0] for rows in found]


def _products(vectors: np.ndarray, embeddings: np.ndarray, n: int) -> list[np.ndarray]:
    block = max(1, 32_000_000 // len(embeddings))  # queries at a time: scores for one block take 128 MB
    rows: list[np.ndarray] = []
    for start in range(0, len(vectors), block):
        rows += list(np.argpartition(vectors[start : start + block] @ embeddings.T, -n, axis=1)[:, -n:])
    return rows


def recall(index: Any, embeddings: np.ndarray, sample: int = 200, n: int = 10) -> float:
    """Share of the true n nearest that the index finds, asked with the vectors of some documents."""
    if index is None:
        return 1.0
    chosen = np.sort(np.random.default_rng(0).choice(len(embeddings), min(sample, len(embeddings)), replace=False))
    vectors, all_of_them = np.ascontiguousarray(embeddings[chosen]), np.zeros(0, dtype=bool)
    exact = nearest(None, embeddings, vectors, n, all_of_them)
    found = nearest(index, embeddings, vectors, n, all_of_them)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))


def _gpu(faiss: Any) -> Any:
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError("--faiss_gpu needs faiss for GPUs; pip install faiss-gpu-cu12, or leave it out")
    return faiss


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss
