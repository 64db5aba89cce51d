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
encryption and no password: keep it inside a network that you trust, or behind a proxy that has both. It is for
programs: what a browser sends for a web page is refused, as is, on this machine alone, what is meant for another host.
"""

from __future__ import annotations

import importlib.util
import io
import ipaddress
import json
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import add_documents, delete_documents
from nanochat.retrieval.lexical import LexicalRetriever
from nanochat.retrieval.manager import RetrievalManager

LARGEST_REQUEST = 64 << 20
MOST_RESULTS = 10_000


def warm_up(manager: RetrievalManager) -> None:
    """Load and compile what the base is searched with, before anybody asks: in the middle of their questions, all would
    wait for it, and the compiler lets nobody else work meanwhile."""
    retriever = manager.retriever
    if importlib.util.find_spec("numba") is not None:
        for part in (retriever, *getattr(retriever, "parts", ())):
            if isinstance(part, LexicalRetriever):
                part.compiled = True  # by itself from the 65th question on
    retriever.search(["what is it?"], 1)


class Server(ThreadingHTTPServer):
    """most_connections: at a time, each with a thread; others are told to come again. patience: seconds that a head, a
    body, and the reading of an answer may take."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        manager: RetrievalManager,
        host: str,
        port: int,
        allow_changes: bool = False,
        most_connections: int = 256,
        patience: float = 60.0,
    ):
        self.manager, self.allow_changes, self.patience = manager, allow_changes, patience
        self.changing = threading.Lock()
        self.places = threading.BoundedSemaphore(most_connections)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port} ({error}); give another --port") from None
        self.local = ipaddress.ip_address(self.server_address[0]).is_loopback
        warm_up(manager)

    def process_request(self, request: socket.socket, address: Any) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, address)
            return
        request.setblocking(False)
        content = b'{"error": "too many connections; try again in a moment"}'
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Retry-After: 1\r\nContent-Length: {len(content)}\r\n\r\n"
        request.send(head.encode() + content)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, address: Any) -> None:
        try:
            super().process_request_thread(request, address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, address: Any) -> None:
        """Nothing: clients leave whenever they like, and what they asked is nobody's business."""


class Arriving(io.RawIOBase):
    """What a client sends, until its time is up: a socket's own timeout begins anew with each byte."""

    def __init__(self, connection: socket.socket):
        self.connection, self.until = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(max(0.001, self.until - time.monotonic()))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.arriving = Arriving(self.connection)
        self.rfile = io.BufferedReader(self.arriving)

    def handle_one_request(self) -> None:
        self.arriving.until = time.monotonic() + self.server.patience
        super().handle_one_request()

    def do_GET(self) -> None:
        # a body is not read, and must not be taken for the next request
        self.close_connection |= "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
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
        if refused := self._refusal():
            self.close_connection = True  # what a POST brought is not read
            self._send(403, {"error": refused})
            return
        if answer is None:
            self.close_connection = True
            self._send(404, {"error": f"no {self.path} here; there are /search, /documents, /score, /stats, /health"})
            return
        try:
            given = [read()] if read else []
        except UserError as error:
            self._send(400, {"error": str(error)})
            return
        try:
            status, content = 200, answer(*given)
        except UserError as error:
            status, content = 400, {"error": str(error)}
        except Exception as error:  # whatever it is, the client hears of it and the server goes on
            status, content = 500, {"error": f"{type(error).__name__}: {error}"}
        self._send(status, content)

    def _refusal(self) -> str:
        """Why this is nothing to answer: of a page in somebody's browser, which may be of any site."""
        if "Origin" in self.headers:
            return "this server is for programs, not for web pages"
        try:
            host = urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            host = ""
        if self.server.local and host not in (None, "localhost", "127.0.0.1", "::1", self.server.server_address[0]):
            return "this server is on localhost and has no other name"
        return ""

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 19):
            length = str(LARGEST_REQUEST + 1)  # how long it is there is no telling
        if int(length) > LARGEST_REQUEST:
            self.close_connection = True  # what was not read would be taken for the next request
            raise UserError(f"the request needs a Content-Length of at most {LARGEST_REQUEST:,}")
        self.arriving.until = time.monotonic() + self.server.patience
        content = self.rfile.read(int(length))
        try:
            body = json.loads(content)
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
        content = json.dumps(answer, ensure_ascii=False).encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.connection.settimeout(self.server.patience)
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself: no HTTP, a head that is too long, another method."""
        self.close_connection = True
        self.request_version = self.protocol_version  # else, to what is no HTTP at all, it answers without a head
        self._send(code, {"error": HTTPStatus(code).phrase})

    def version_string(self) -> str:
        return "nanochat"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what people search for is nobody's business."""


def _strings(body: dict[str, Any], name: str) -> list[str]:
    values = body.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f'"{name}" must be a list of strings')
    return values
