"""Chat in the browser, and OpenAI's API, over a knowledge base.

    python -m scripts.chat_web --knowledge_base data/my_kb
    python -m scripts.chat_web --knowledge_base data/my_kb,data/other_kb --source refrag --host 0.0.0.0 --api_key SECRET

    GET  /                          the page
    GET  /v1/models                 the model
    POST /v1/chat/completions       as OpenAI's, streaming or not; besides "knowledge_base": its name, "top_k", and
                                    "retrieval": false for none. The passages come as "sources" and, where the answer
                                    cites them, as annotations
    GET  /v1/knowledge_bases        names and sizes
    GET  /v1/knowledge_bases/NAME/documents/ID     a document's text
    GET  /health
    GET  /openapi.json              all of this for programs

It listens on this machine alone unless told otherwise. Nothing that is said is logged or kept. With a key, only the
page and /health are open to those who do not send it. Requests are limited in their length and in the time that they
may take to arrive, answers in the time that they may lie unread.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Before torch is loaded. oneDNN keeps what it has compiled for the last 1,024 shapes, and prompts come in every length.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_init, print0, run_main
from nanochat.config import load_config
from nanochat.engine import Engine
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.serve import warm_up

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException

    from scripts import _completions as api
    from scripts._completions import Chat, Completion, Limits, Refused, overloaded, stream, whole
    from scripts._guard import MAX_HEAD_BYTES, Connection, Guard, security
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install 'nanochat[web]'") from None

PAGE = Path(__file__).with_suffix(".html")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass
class Config:
    """Serve a model that answers from knowledge bases."""

    knowledge_base: list[Path]
    """Folders of knowledge bases, separated by commas; the first is used where none is asked for."""
    source: str = "rag"
    """Stage of training the model comes from: rag, mid or base; refrag, refrag_rl, agent_sft and agent search by
    themselves."""
    model_tag: str = ""
    """Which model of that stage; empty: the one trained last."""
    retriever_type: str | None = None
    """simple, bm25, dense, hybrid or kg; if not given, what each base was built for."""
    top_k: int | None = None
    """Documents for a question (5), or for each search of a model that searches by itself (as in its training)."""
    max_tokens: int = 256
    """Longest answer, in tokens, where the client does not say."""
    max_doc_length: int = 500
    """Longest document, in tokens; the rest of it is cut off."""
    refusal_threshold: float | None = None
    """Refuse to answer where the model gives that at least this probability; by default as it writes."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every one this machine has."""
    port: int = 8000
    """Port to listen on."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names that it may be called by, separated by commas; where it listens on this machine alone, or any are given,
    requests for other names are refused: a page of another site could have its own name lead here."""
    api_key: str = field(default_factory=lambda: os.environ.get("NANOCHAT_API_KEY", ""))
    """If given, or in NANOCHAT_API_KEY, clients have to send it: Authorization: Bearer KEY."""
    max_rows: int = 16
    """Answers that are written at a time."""
    max_waiting: int = 64
    """Requests that may wait; others are told to come again."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


# --- the server


def create_app(config: Config, engine: Engine, meta: dict[str, Any], managers: dict[str, RetrievalManager]) -> FastAPI:
    name = f"{config.source}-{meta.get('model_tag', 'model')}"
    limits = Limits(
        config.top_k,
        config.max_tokens,
        config.max_doc_length,
        config.max_rows,
        config.max_waiting,
        config.refusal_threshold,
    )
    chat = Chat(name, engine, meta, managers, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        chat.worker.close()

    app = FastAPI(title="nanochat", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.chat = chat
    app.add_middleware(Guard, hosts=known_hosts(config), api_key=config.api_key)

    @app.exception_handler(HTTPException)  # Starlette's, and so FastAPI's and Refused
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        detail = error.detail
        if not isinstance(detail, dict):  # of the framework: no such address, no such method
            detail = {"message": str(detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        detail = {"message": f"{place}: {first['msg']}" if place else first["msg"], "type": "invalid_request_error"}
        return JSONResponse({"error": {**detail, "param": place or None, "code": None}}, 400)

    page_text = PAGE.read_text(encoding="utf-8")
    failures: dict[int | str, dict[str, Any]] = {status: {"model": api.Failed} for status in ("4XX", "5XX")}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(page_text, headers={"Cache-Control": "no-cache"})

    @app.get("/health", response_model=api.Health, responses=failures)
    async def health() -> dict[str, Any]:
        return {"status": "ok", "load": chat.worker.load}

    @app.get("/v1/models", response_model=api.Models, responses=failures)
    async def models() -> dict[str, Any]:
        one = {"id": chat.name, "object": "model", "created": chat.created, "owned_by": "nanochat"}
        return {"object": "list", "data": [one]}

    @app.get("/v1/knowledge_bases", response_model=api.Bases, responses=failures)
    async def knowledge_bases() -> dict[str, Any]:
        data = [{"id": n, "documents": len(m), "retriever": m.retriever_type} for n, m in chat.managers.items()]
        return {"object": "list", "data": data}

    @app.get(
        "/v1/knowledge_bases/{name}/documents/{id:path}",
        response_model=api.Text,
        response_model_exclude_unset=True,
        responses=failures,
    )
    async def document(name: str, id: str) -> dict[str, Any]:
        _, manager = chat.manager(name)
        (found,) = await run_in_threadpool(manager.retriever.get, [id])
        if found is None:
            raise Refused(404, f"no document {id!r} in {name}", "not_found")
        return found.to_dict(with_score=False)

    # each event's data: a chunk as OpenAI has them, or [DONE]
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    streamed = {"content": {"text/event-stream": {"schema": event}}}

    @app.post(
        "/v1/chat/completions",
        response_model=api.Answer,
        response_model_exclude_unset=True,
        responses={200: streamed, **failures},
    )
    async def completions(asked: Completion, http: Request) -> Any:
        if chat.full:  # before it costs a search, and before an answer's head is sent
            raise overloaded()
        prepared = await run_in_threadpool(chat.prepare, asked)
        place = f"{http.base_url}v1/knowledge_bases/{quote(prepared.base, safe='')}/documents/"
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.name}
        if not asked.stream:
            return await whole(chat, prepared, place, about, http)
        if chat.full:
            raise overloaded()
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        chunks = stream(chat, prepared, place, about, with_usage)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return app


# --- in front of it


def known_hosts(config: Config) -> list[str] | None:
    """The names that requests may be for; None: any."""
    try:
        local = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        local = config.host == "localhost"
    return [*LOCAL_NAMES, config.host, *config.allowed_hosts] if local or config.allowed_hosts else None


def create_server(app: FastAPI) -> uvicorn.Server:
    # by uvicorn, so that its own answers have the headers as well
    headers = list(security(PAGE.read_text(encoding="utf-8")).items())
    settings: dict[str, Any] = {"http": Connection, "ws": "none", "h11_max_incomplete_event_size": MAX_HEAD_BYTES}
    settings |= {"headers": headers, "server_header": False, "log_level": "warning", "access_log": False}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **settings))


# --- the command


def open_bases(config: Config) -> dict[str, RetrievalManager]:
    managers: dict[str, RetrievalManager] = {}
    for path in config.knowledge_base:
        folder = path.resolve()
        name = folder.parent.name if folder.name == "knowledge_base" else folder.name  # as prepare_rag_dataset has it
        if name in managers:
            raise UserError(f"two knowledge bases are called {name!r}; rename one folder")
        managers[name] = RetrievalManager(config.retriever_type, path)
        warm_up(managers[name])
    if not managers:
        raise UserError("give --knowledge_base FOLDER; python -m nanochat.retrieval builds one")
    return managers


def listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a port that another program has is said at once."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: a number from 1 to 65535 (0: any that is free)")
    try:
        ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): give another --port or --host") from None
    return sock


def main() -> None:
    config = load_config(Config)
    for name in ("top_k", "max_tokens", "max_doc_length", "max_rows"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 1")
    if config.refusal_threshold is not None and not 0 <= config.refusal_threshold <= 1:
        raise UserError(f"--refusal_threshold {config.refusal_threshold} must be from 0 to 1")
    managers = open_bases(config)
    sock = listen(config.host, config.port)
    compute = compute_init(config.device, 0)
    model, tokenizer, meta = load_model(config.source, compute.device, model_tag=config.model_tag)
    app = create_app(config, Engine(model, tokenizer, prefix_bytes=1 << 29), meta, managers)
    where = f"http://{'localhost' if config.host in ('127.0.0.1', '0.0.0.0') else config.host}:{sock.getsockname()[1]}"
    print0(f"{app.state.chat.name} over {', '.join(managers)}: {where} (API: {where}/v1)")
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
        print0("anybody who reaches this address can use it: --api_key SECRET keeps others out")
    create_server(app).run(sockets=[sock])


if __name__ == "__main__":
    run_main(main)
