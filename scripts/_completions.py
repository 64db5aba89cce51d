"""Chat completions as OpenAI's API has them, answered from knowledge bases: what a client may ask, and what it gets."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import HTTPException, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nanochat.citations import Source, cited_passages
from nanochat.common import UserError
from nanochat.conversation import answer_text, render_prompt
from nanochat.engine import Engine
from nanochat.retrieval import Document, RetrievalManager
from nanochat.sampling import Sampling
from nanochat.searching import Request as Asked
from nanochat.searching import Searching
from nanochat.worker import Busy, Event, Worker

MAX_TOP_K = 100
_CITED = re.compile(r"\[(\d{1,4})\]")


@dataclass
class Limits:
    """What a server gives where the client does not ask for less."""

    top_k: int | None = None
    max_tokens: int = 256
    max_doc_length: int = 500
    max_rows: int = 16
    max_waiting: int = 64
    refusal_threshold: float | None = None


# --- what a client may ask


class Strict(BaseModel):
    """A number is no text, and a text no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


def _whole(value: Any) -> Any:
    """1.0 is 1 in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Completion(Strict):
    """Of OpenAI's settings those that mean something here; others are ignored."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Whole] | None = None
    n: Literal[1] = 1
    knowledge_base: str | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K), Whole] | None = None
    retrieval: bool = True


class Refused(HTTPException):
    """An error as OpenAI words them."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        kind = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        super().__init__(status, {"message": message, "type": kind, "param": param, "code": code}, headers)


def overloaded() -> Refused:
    why = "too many requests are waiting; try again in a moment"
    return Refused(429, why, "overloaded", headers={"Retry-After": "1"})


def unfit(error: UserError) -> Refused:
    return Refused(400, str(error), "context_length_exceeded" if "tokens" in str(error) else None, "messages")


# --- what a server answers


class Failure(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Failed(BaseModel):
    error: Failure


class Health(BaseModel):
    status: Literal["ok"]
    load: int


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Base(BaseModel):
    id: str
    documents: int
    retriever: str


class Bases(BaseModel):
    object: Literal["list"]
    data: list[Base]


class Text(BaseModel):
    """A document."""

    id: str
    title: str
    content: str
    source: str = ""
    metadata: dict[str, Any] = {}


class Found(Text):
    """A document that the model was given, under its number. passage: what of its content the answer cites."""

    number: int
    read: bool
    score: float
    explanation: dict[str, Any] = {}
    passage: tuple[int, int] | None = None


class Url(BaseModel):
    start_index: int
    end_index: int
    title: str
    url: str


class Citation(BaseModel):
    type: Literal["url_citation"]
    url_citation: Url


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    annotations: list[Citation]


class Choice(BaseModel):
    index: int
    message: Said
    finish_reason: Literal["stop", "length"]
    logprobs: None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    sources: list[Found]


@dataclass
class Prepared:
    """A question on its way to the engine."""

    request: Asked
    sources: list[Source]  # found before the model answers
    question: str
    base: str

    @property
    def found(self) -> list[Source]:
        """The sources, with what the model's own searches found."""
        documents = [document for hop in self.request.hops for document in hop.documents]
        return self.sources + [Source(n, document) for n, document in enumerate(documents, len(self.sources) + 1)]

    @property
    def usage(self) -> dict[str, int]:
        request = self.request
        read, written = len(request.prompt) + len(request.ids) - sum(request.mask), sum(request.mask)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# --- one answer


class Chat:
    """The model, its worker and the knowledge bases."""

    def __init__(
        self, name: str, engine: Engine, meta: dict[str, Any], managers: dict[str, RetrievalManager], limits: Limits
    ):
        """meta: the checkpoint's. The first of the managers is used where a client names none."""
        self.name, self.engine, self.managers, self.limits = name, engine, managers, limits
        self.created = int(time.time())
        self.room = meta.get("training_config", {}).get("max_seq_len", 2048)
        self.max_hops = meta.get("max_hops", 0)
        self.top_k = limits.top_k or meta.get("top_k_per_hop", 5)
        self.worker = Worker(engine, limits.max_rows, limits.max_waiting)

    @property
    def full(self) -> bool:
        return self.worker.load >= self.limits.max_rows + self.limits.max_waiting

    def manager(self, name: str | None) -> tuple[str, RetrievalManager]:
        name = name or next(iter(self.managers))
        if name not in self.managers:
            known = ", ".join(self.managers)
            raise Refused(404, f"no knowledge base {name!r}; there are {known}", "not_found", "knowledge_base")
        return name, self.managers[name]

    def prepare(self, asked: Completion) -> Prepared:
        """It searches: not for the thread that serves all."""
        if asked.model not in ("", self.name):
            raise Refused(404, f"no model {asked.model!r}; there is {self.name}", "model_not_found", "model")
        messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in asked.messages]
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise Refused(400, "the last message must be the user's, and not empty", param="messages")
        name, manager = self.manager(asked.knowledge_base)
        max_tokens = min(asked.max_completion_tokens or asked.max_tokens or self.limits.max_tokens, self.room)
        held = min(max_tokens, self.room // 4)
        searches = self.max_hops > 0 and asked.retrieval
        tokenizer = self.engine.tokenizer
        room = self.room // 2 if searches else self.room - held
        documents: list[Document] = []
        try:
            render_prompt({"messages": messages}, tokenizer, room)  # what cannot be answered is not searched for
        except UserError as error:
            raise unfit(error) from None
        if asked.retrieval and not searches:
            documents = manager.retrieve(messages[-1]["content"], asked.top_k or self.top_k)
            found = {"role": "retrieval", "documents": [document.to_dict() for document in documents]}
            messages = [*messages[:-1], found, messages[-1]]
        try:
            prompt = render_prompt({"messages": messages}, tokenizer, room, self.limits.max_doc_length)
            sampling = Sampling(
                max_tokens=min(max_tokens, self.room - len(prompt)),
                temperature=asked.temperature,
                refusal_threshold=self.limits.refusal_threshold,
                top_p=asked.top_p,
                stop=tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
                seed=asked.seed or 0,
            )
        except UserError as error:
            raise unfit(error) from None
        searching = None
        if searches:
            most = asked.top_k or self.top_k
            context = self.room - held
            searching = Searching(
                manager.search, most, self.max_hops, max_doc_tokens=self.limits.max_doc_length, max_context=context
            )
        left = prompt.count(tokenizer.special_id("<|doc_start|>"))
        sources = [Source(n, document, n <= left) for n, document in enumerate(documents, 1)]
        request = Asked.of_conversation({"messages": messages}, prompt, sampling, tokenizer, searching)
        return Prepared(request, sources, messages[-1]["content"], name)

    async def answer(self, request: Asked) -> AsyncIterator[tuple[str, str]]:
        """(new text, "") again and again, then ("", finish reason). Closing it gives the answer up."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            ticket = self.worker.submit(request, tell)
        except Busy:
            raise overloaded() from None
        ids: list[int] = []
        given = ""
        try:
            while True:
                event = await events.get()
                if event.error:
                    raise Refused(500, "the answer failed; the server's log says where", "internal_error")
                ids += event.ids
                text = _before_stop(answer_text(ids, self.engine.tokenizer), request.sampling.stop)
                if not event.finish_reason:  # half a character, or half a stop text, waits for the rest
                    text = text.rstrip("\ufffd")
                    text = text[: len(text) - max((len(stop) - 1 for stop in request.sampling.stop), default=0)]
                text = text.rstrip()
                if text.startswith(given) and len(text) > len(given):
                    yield text[len(given) :], ""
                    given = text
                if event.finish_reason:
                    yield "", "stop" if event.finish_reason == "stop" else "length"
                    return
        finally:
            ticket.cancel()


def _before_stop(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def describe(sources: list[Source], question: str = "", answer: str = "") -> list[dict[str, Any]]:
    """Sources for the client; of those that the answer cites, the passage (start, end) of the content that says it."""
    passages = cited_passages(sources, question, answer)
    return [
        {"number": source.number, "read": source.read, **source.document.to_dict()}
        | ({"passage": passages[source.number]} if source.number in passages else {})
        for source in sources
    ]


def annotate(answer: str, sources: list[Source], place: str) -> list[dict[str, Any]]:
    """Where the answer cites which source, as OpenAI's url_citation. place: address of the base's documents."""
    by_number = {source.number: source.document for source in sources}
    notes = []
    for match in _CITED.finditer(answer):
        document = by_number.get(int(match[1]))
        if document is None:
            continue
        web = document.source.startswith(("http://", "https://"))
        citation = {
            "start_index": match.start(),
            "end_index": match.end(),
            "title": document.title or document.id,
            "url": document.source if web else place + quote(document.id, safe=""),
        }
        notes.append({"type": "url_citation", "url_citation": citation})
    return notes


# --- what it gets


async def whole(chat: Chat, prepared: Prepared, place: str, about: dict[str, Any], http: Request) -> dict[str, Any]:
    """The answer in one piece; given up where the client leaves meanwhile."""

    async def collect() -> tuple[str, str]:
        text, reason = "", "stop"
        async for new, ended in chat.answer(prepared.request):
            text, reason = text + new, ended
        return text, reason

    work = asyncio.ensure_future(collect())
    try:
        while not (await asyncio.wait([work], timeout=0.1))[0]:
            if await http.is_disconnected():
                raise Refused(499, "the client has left")
        text, reason = work.result()
    finally:
        work.cancel()
    message = {"role": "assistant", "content": text, "annotations": annotate(text, prepared.found, place)}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    sources = describe(prepared.found, prepared.question, text)
    return {**about, "object": "chat.completion", "choices": [choice], "usage": prepared.usage, "sources": sources}


async def stream(
    chat: Chat, prepared: Prepared, place: str, about: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role and the sources, the text, its citations with the reason it ended, the usage."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return "data: " + json.dumps({**about, "object": "chat.completion.chunk", "choices": choices, **more}) + "\n\n"

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event([choice], **({"usage": None} if with_usage else {}), **more)

    text = ""
    yield chunk({"role": "assistant", "content": ""}, sources=describe(prepared.sources))
    answer = chat.answer(prepared.request)
    try:
        async for new, reason in answer:
            text += new
            if not reason:
                yield chunk({"content": new})
                continue
            notes = annotate(text, prepared.found, place)
            more: dict[str, Any] = {"sources": describe(prepared.found, prepared.question, text)}
            if prepared.request.hops:
                more["searches"] = [hop.query for hop in prepared.request.hops]
            yield chunk({"annotations": notes} if notes else {}, reason, **more)
    except Refused as error:  # the head is sent: the error comes as an event
        yield "data: " + json.dumps({"error": error.detail}) + "\n\n"
        return
    finally:
        await answer.aclose()
    if with_usage:
        yield event([], usage=prepared.usage)
    yield "data: [DONE]\n\n"
