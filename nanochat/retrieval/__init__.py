"""Retrieval: documents in, the best of them for a question out. Command line: python -m nanochat.retrieval --help"""

from __future__ import annotations

from typing import Any

from nanochat.retrieval.document import Document

__all__ = ["Document", "RetrievalManager"]


def __getattr__(name: str) -> Any:
    # the data scripts need documents only, and should not pay for loading every retriever
    if name == "RetrievalManager":
        from nanochat.retrieval.manager import RetrievalManager

        return RetrievalManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
