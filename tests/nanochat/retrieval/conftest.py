from __future__ import annotations

import sys

import pytest

KINDS = ["simple", "bm25", "dense", "dense without faiss", "hybrid", "hybrid rrf"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if request.param == "dense without faiss":
        monkeypatch.setitem(sys.modules, "faiss", None)
    elif request.param == "dense":
        pytest.importorskip("faiss")
    return request.param
