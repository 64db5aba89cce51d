"""A retriever on another machine: the same calls, answered by `python -m nanochat.retrieval serve` there.

retriever = RetrievalClient("http://10.0.0.5:8090")
retriever.search(["return policy"], top_k=5)
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import Document


class RetrievalClient:
    type = "client"

    def __init__(self, url: str, timeout: float = 60.0, queries_at_once: int = 256):
        """timeout: seconds for one request."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the server's address is {url!r}; it must begin with http:// or https://")
        self.url, self.timeout, self.queries_at_once = url.rstrip("/"), timeout, queries_at_once

    def search(
        self, queries: list[str], top_k: int = 5, where: dict[str, Any] | None = None, explain: bool = False
    ) -> list[list[Document]]:
        if isinstance(queries, str):
            raise TypeError("search takes a list of queries; for one query: search([query])")
        found = []
        for start in range(0, len(queries), self.queries_at_once):
            some = list(queries[start : start + self.queries_at_once])
            answer = self._ask("/search", {"queries": some, "top_k": top_k, "where": where, "explain": explain})
            found += [[Document.from_dict(record) for record in hits] for hits in answer["results"]]
        return found

    def score(self, query: str, ids: list[str]) -> list[float]:
        return self._ask("/score", {"query": query, "ids": list(ids)})["scores"]

    def get(self, ids: Iterable[str]) -> list[Document | None]:
        ids, found = list(ids), []
        for start in range(0, len(ids), self.queries_at_once):
            some = ids[start : start + self.queries_at_once]
            found += self._ask("/documents", {"ids": some})["documents"]
        return [record and Document.from_dict(record) for record in found]

    def add(self, documents: Iterable[Document]) -> None:
        self._ask("/add", {"documents": [document.to_dict(with_score=False) for document in documents]})

    def delete(self, ids: Iterable[str]) -> None:
        if isinstance(ids, str):
            raise TypeError("delete takes ids; for one document: delete([id])")
        self._ask("/delete", {"ids": list(ids)})

    def stats(self) -> dict[str, Any]:
        return self._ask("/stats")

    def __len__(self) -> int:
        return self.stats()["counts"]["documents"]

    def settings(self) -> dict[str, Any]:
        return {"url": self.url}

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            try:
                reason = json.loads(error.read())["error"]
            except (ValueError, KeyError, TypeError):
                reason = f"status {error.code}"
            raise UserError(f"{self.url}: {reason}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, (BrokenPipeError, ConnectionResetError)):  # before it has read what was sent
                raise UserError(
                    f"{self.url} has closed the connection ({reason}): it may have too many connections; try again"
                ) from None
            raise UserError(
                f"no retrieval server answers at {self.url} ({reason}); start one: "
                "python -m nanochat.retrieval serve --knowledge_base DIRECTORY"
            ) from None
