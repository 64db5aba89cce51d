from __future__ import annotations

import sys

import pytest

KINDS = ["simple", "bm25", "dense", "dense without faiss", "hybrid", "hybrid rrf"]
ELSEWHERE = ["client", "milvus bm25", "milvus dense", "milvus hybrid"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    return _ready(request, monkeypatch)


@pytest.fixture(params=[*KINDS, *ELSEWHERE])
def any_kind(request, monkeypatch):
    """Those too whose documents lie on a server."""
    return _ready(request, monkeypatch)


def _ready(request, monkeypatch):
    if request.param.startswith("milvus"):
        pytest.importorskip("pymilvus")
    if request.param == "dense without faiss":
        monkeypatch.setitem(sys.modules, "faiss", None)
    elif request.param == "dense":
        pytest.importorskip("faiss")
    return request.param
