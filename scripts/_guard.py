"""What stands between a server and the world: limits of length and patience, names, the key, headers for browsers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import sys
from typing import Any
from urllib.parse import urlsplit

import h11
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.worker import what_failed
from scripts._completions import Refused

MAX_BODY_BYTES = 2_000_000
MAX_HEAD_BYTES = 16_384
OPEN_TO_ALL = ("/", "/health")  # also where there is a key


def security(page: str) -> dict[str, str]:
    """Headers for every answer: of scripts and styles a browser runs those of the page alone."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'"
    return {
        "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


class Guard:
    """Refuses what is for another host, too long or without the key, before anything reads it. What fails behind it is
    answered and logged without the words of the error, which may be somebody's."""

    def __init__(self, app: Any, hosts: list[str] | None, api_key: str):
        self.app, self.hosts, self.api_key = app, hosts and {host.lower() for host in hosts}, api_key.encode()

    def refusal(self, scope: Any) -> Refused | None:
        headers = dict(scope["headers"])
        in_headers = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["path"]) + len(scope["query_string"]) + in_headers > MAX_HEAD_BYTES:
            return Refused(431, f"the request's head is over {MAX_HEAD_BYTES:,} bytes", "request_too_large")
        try:
            host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1")).hostname
        except ValueError:
            host = None
        if self.hosts and host not in self.hosts:
            return Refused(400, "this server has another name; --allowed_hosts gives it more", "unknown_host")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > MAX_BODY_BYTES):
            return too_long()
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(sent.strip(), self.api_key)
        if self.api_key and scope["path"] not in OPEN_TO_ALL and not known:
            why = "this server needs its key: Authorization: Bearer KEY"
            return Refused(401, why, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, started = 0, False

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise too_long()
            return message

        async def noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        refused = self.refusal(scope)
        try:
            if refused is None:
                await self.app(scope, limited, noted)
        except Exception as error:
            print(what_failed(error), file=sys.stderr, flush=True)
            if not started:  # otherwise its half-sent answer is cut off
                refused = Refused(500, "the server failed at this request; its log says where", "internal_error")
        if refused is not None:
            await JSONResponse({"error": refused.detail}, refused.status_code, refused.headers)(scope, receive, send)


def too_long() -> Refused:
    return Refused(413, f"the request is over {MAX_BODY_BYTES:,} bytes", "request_too_large")


class Connection(H11Protocol):
    """uvicorn's, with an end to its patience: by itself it waits for ever for the rest of a request, and for a client
    that does not read what it is sent."""

    patience = 30.0  # seconds; for a head, for a body, and for anything of an answer to be read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waits_for, self._unread, self._since = None, 0, self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watching.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        cycle, now, unread = self.cycle, self.loop.time(), self.transport.get_write_buffer_size()
        answering = cycle is not None and not (cycle.more_body or cycle.response_complete)
        waits_for = (cycle, answering)
        if waits_for != self._waits_for or unread < self._unread or (answering and not unread):
            self._since = now
        self._waits_for, self._unread = waits_for, unread
        if now - self._since >= self.patience:
            self.transport.abort()
        self._watching = self.loop.call_later(self.patience / 30, self._watch)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP: an answer like all others, unless one is half sent."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps({"error": Refused(400, msg).detail}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            headers += [*self.server_state.default_headers, (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
