"""A knowledge base over HTTP, for other machines and programs; only the standard library.

    python -m nanochat.retrieval serve --knowledge_base data/my_kb --host 0.0.0.0 --port 8090

    POST /search   {"queries": ["return policy", ...], "top_k": 5, "where": {...}?}
                   -> {"version": "v0002", "results": [[{"id", "title", "content", "score", ...}, ...], ...]}
                   "explain": true adds each part's rank and score
    POST /documents {"ids": [...]} -> {"documents": [{...} or null, ...]}
    POST /score    {"query": "...", "ids": [...]} -> {"scores": [...]}
    POST /add      {"documents": [...]}, POST /delete {"ids": [...]}: only with --allow_changes true
    GET  /stats    what the base is
    GET  /health   {"status": "ok"}

A wrong request gets {"error": "..."} with status 400. A new version of the base is seen within a second. There is no
encryption and no password: keep it inside a network that you trust, or behind a proxy that has both.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import add_documents, delete_documents
from nanochat.retrieval.manager import RetrievalManager

LARGEST_REQUEST = 64 << 20
MOST_RESULTS = 10_000


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, manager: RetrievalManager, host: str, port: int, allow_changes: bool = False):
        self.manager, self.allow_changes = manager, allow_changes
        self.changing = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port} ({error}); give another --port") from None


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        answers = {"/health": lambda: {"status": "ok"}, "/stats": self._stats}
        self._answer(answers.get(self.path))

    def do_POST(self) -> None:
        answers = {
            "/search": self._search,
            "/documents": self._documents,
            "/score": self._score,
            "/add": self._add,
            "/delete": self._delete,
        }
        self._answer(answers.get(self.path), self._body)

    def _answer(self, answer: Any, read: Any = None) -> None:
        try:
            if answer is None:
                self.close_connection = True  # what a POST brought is not read
                self._send(
                    404, {"error": f"no {self.path} here; there are /search, /documents, /score, /stats, /health"}
                )
            else:
                self._send(200, answer(read()) if read else answer())
        except UserError as error:
            self._send(400, {"error": str(error)})
        except Exception as error:  # whatever it is, the client hears of it and the server goes on
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST_REQUEST:
            self.close_connection = True  # what was not read would be taken for the next request
            raise UserError(f"the request needs a Content-Length of at most {LARGEST_REQUEST:,}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise UserError("the request must be a JSON object")
        return body

    def _search(self, body: dict[str, Any]) -> dict[str, Any]:
        queries, top_k, where = _strings(body, "queries"), body.get("top_k", 5), body.get("where")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MOST_RESULTS:
            raise UserError(f'"top_k" must be a whole number from 1 to {MOST_RESULTS:,}')
        if where is not None and not isinstance(where, dict):
            raise UserError('"where" must be an object, such as {"lang": "en"}')
        version, found = self.server.manager.search_with_version(queries, top_k, where, bool(body.get("explain")))
        return {"version": version, "results": [[document.to_dict() for document in hits] for hits in found]}

    def _documents(self, body: dict[str, Any]) -> dict[str, Any]:
        found = self.server.manager.retriever.get(_strings(body, "ids"))
        return {"documents": [document and document.to_dict(with_score=False) for document in found]}

    def _score(self, body: dict[str, Any]) -> dict[str, Any]:
        (query,) = _strings({"query": [body.get("query")]}, "query")
        return {"scores": self.server.manager.retriever.score(query, _strings(body, "ids"))}

    def _stats(self) -> dict[str, Any]:
        manifest = self.server.manager.knowledge_base.manifest
        names = ("created", "retriever", "settings", "embedding", "counts")
        return {"version": self.server.manager.knowledge_base.version, **{name: manifest[name] for name in names}}

    def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        documents = body.get("documents")
        if not isinstance(documents, list) or not all(isinstance(record, dict) for record in documents):
            raise UserError('"documents" must be a list of objects {"id", "title", "content"}')
        return self._changed(add_documents, [Document.from_dict(record) for record in documents])

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._changed(delete_documents, _strings(body, "ids"))

    def _changed(self, change: Any, given: list[Any]) -> dict[str, Any]:
        if not self.server.allow_changes:
            raise UserError("this server only searches; start it with --allow_changes true")
        with self.server.changing:
            manager = self.server.manager
            knowledge_base = change(manager.knowledge_base.path, given, **manager.settings)
            manager.refresh(now=True)
        return {"version": knowledge_base.version, "documents": len(knowledge_base)}

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what people search for is nobody's business."""


def _strings(body: dict[str, Any], name: str) -> list[str]:
    values = body.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f'"{name}" must be a list of strings')
    return values
