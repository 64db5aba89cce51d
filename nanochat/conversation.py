"""Conversations -> token ids and loss mask. The only place where text meets special tokens.

    <|bos|>
    <|system_start|> text <|system_end|>
    <|retrieval_start|> [<|search_start|> query <|search_end|>]
        <|doc_start|> title 1 <|doc_body|> content <|doc_end|> ... <|retrieval_end|>
    <|user_start|> text <|user_end|>
    <|assistant_start|> text <|assistant_end|>

An assistant message may hold parts: text, a search (<|search_start|> query <|search_end|>, written by the model) and
the documents that came back (a retrieval block). Loss falls on what the model writes: its text, its searches with their
markers, and <|assistant_end|>. Documents are numbered 1, 2, ... through the whole conversation, so that a number names
one document however long the talk is, and keeps its number when others are dropped for length; an answer cites it as
[1]. The number stands right after the title: to find a name and say what follows it is the first kind of lookup that a
small model learns, so it learns to cite (docs/lab_notes.md).

Every text begins with a space, so that its first word has the tokens it has inside a sentence.
All text is encoded as ordinary text: whatever a document or a user spells, it never becomes a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer

ROLES = ("system", "retrieval", "user", "assistant")
MAX_TITLE_TOKENS = 64  # a title is a label; a longer one (a whole text put in the wrong field) is cut


@dataclass
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    mask: list[int]
    """1 where the token is to be predicted: the model writes it. 0 on everything that is given to the model."""
    dropped_documents: int
    """Documents left out to fit max_tokens, those of dropped turns included."""
    document_spans: list[tuple[int, int]]
    """For each rendered document, in order, ids[start:end] from <|doc_start|> to <|doc_end|> inclusive."""


@dataclass
class _Segment:
    """A stretch of tokens that is kept or dropped as one."""

    ids: list[int]
    learned: bool = False
    is_document: bool = False


@dataclass
class _Turn:
    """One exchange: everything up to and including an assistant message (or the end)."""

    segments: list[_Segment] = field(default_factory=list)

    @property
    def text_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments if not segment.is_document)

    @property
    def documents(self) -> list[_Segment]:
        return [segment for segment in self.segments if segment.is_document]


def render(
    conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None, max_doc_tokens: int = 500
) -> Rendered | None:
    """A training example: the whole conversation with its loss mask.

    Over max_tokens, documents go first (from the end), then whole turns (from the end; the first stays). None if the
    first turn without documents is still too long.
    """
    validate(conversation)
    head, turns = _segments(conversation, tokenizer, max_doc_tokens)
    limit = float("inf") if max_tokens is None else max_tokens

    # What has to go is found from what can stay: as many turns as fit without documents, then documents into the rest.
    room = limit - sum(len(segment.ids) for segment in head) - turns[0].text_tokens
    if room < 0:
        return None
    kept_turns = turns[:1]
    for turn in turns[1:]:
        if turn.text_tokens > room:
            break
        room -= turn.text_tokens
        kept_turns.append(turn)
    kept_documents = _fitting((document for turn in kept_turns for document in turn.documents), room)
    return _assemble(head, turns, kept_turns, kept_documents)


def render_prompt(
    conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None, max_doc_tokens: int = 500
) -> list[int]:
    """What the model reads before it answers: everything so far, then <|assistant_start|>.

    Over max_tokens, the past goes before the present: documents of earlier turns (oldest turn first), then earlier
    turns (oldest first), then documents of this turn; within a turn the last document goes first. The system message
    and the question always stay: UserError if even they do not fit.
    """
    validate(conversation, training=False)
    if conversation["messages"][-1]["role"] == "assistant":
        raise UserError("a prompt must not end with an assistant message: there is nothing left to answer")
    head, turns = _segments(conversation, tokenizer, max_doc_tokens)
    turns[-1].segments.append(_Segment([tokenizer.special_id("<|assistant_start|>")]))
    limit = float("inf") if max_tokens is None else max_tokens

    needed = sum(len(segment.ids) for segment in head) + turns[-1].text_tokens
    if needed > limit:
        raise UserError(f"the question takes {needed} tokens without any document, but only {max_tokens} fit")
    room = limit - needed
    # The order of keeping is the order of dropping, backwards.
    kept_documents = _fitting(turns[-1].documents, room)
    room -= sum(len(document.ids) for document in kept_documents)
    kept_turns = turns[-1:]
    if len(kept_documents) == len(turns[-1].documents):
        for turn in reversed(turns[:-1]):
            if turn.text_tokens > room:
                break
            room -= turn.text_tokens
            kept_turns.insert(0, turn)
        if len(kept_turns) == len(turns):
            past = [document for turn in reversed(kept_turns[:-1]) for document in turn.documents]
            kept_documents += _fitting(past, room)
    return _assemble(head, turns, kept_turns, kept_documents).ids


def render_block(
    documents: Sequence[Any],
    tokenizer: Tokenizer,
    query: str | None = None,
    first_number: int = 1,
    max_doc_tokens: int = 500,
) -> list[int]:
    """One retrieval block on its own, for the engine to insert after a search the model wrote."""
    block = _block(documents, query, tokenizer, first_number, max_doc_tokens)
    return [i for segment in block for i in segment.ids]


def count_documents(conversation: dict[str, Any]) -> int:
    """How many documents the conversation shows; the next one gets this number plus one."""
    return sum(len(documents) for message in conversation["messages"] for documents, _ in _message_blocks(message))


def block_documents(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents that the conversation shows, as objects."""
    blocks = [block for message in conversation["messages"] for block in _message_blocks(message)]
    return [_as_dict(document) for documents, _ in blocks for document in documents]


def answer_ids(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[int]:
    """The text tokens of a generated answer as they come: up to <|assistant_end|>, without searches, what they found,
    and markers."""
    end = tokenizer.special_id("<|assistant_end|>")
    closing = {
        tokenizer.special_id("<|search_start|>"): tokenizer.special_id("<|search_end|>"),
        tokenizer.special_id("<|retrieval_start|>"): tokenizer.special_id("<|retrieval_end|>"),
    }
    first_special = min(tokenizer.special_id(name) for name in tokenizer.special_tokens)
    waiting_for = None  # the marker that ends the stretch being left out
    for i in ids:
        if i == end:
            return
        if waiting_for is not None:
            waiting_for = None if i == waiting_for else waiting_for
        elif i in closing:
            waiting_for = closing[i]
        elif i < first_special:
            yield i


def answer_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a generated answer."""
    return tokenizer.decode(list(answer_ids(ids, tokenizer))).strip()


def validate(conversation: dict[str, Any], training: bool = True) -> None:
    """Raise UserError, naming the message, if the conversation is not one. For training it must hold full answers."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')
    previous = None  # the last system, user or assistant role; retrieval may come before or after the question
    for position, message in enumerate(messages):
        where = f"message {position + 1}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
        if role == "retrieval":
            _validate_retrieval(message, where)
            continue
        allowed = {"system": position == 0, "user": previous != "user", "assistant": previous == "user"}
        if not allowed[role]:
            rule = {
                "system": "must be the first message",
                "user": "follows another user message without an answer between them",
                "assistant": "must answer a user message",
            }
            raise UserError(f"{where}: the {role} message {rule[role]}")
        previous = role
        if role == "assistant":
            _validate_assistant(message, where, training)
        elif not isinstance(message.get("content"), str):
            raise UserError(f"{where}: the content of a {role} message is text, not {_kind(message.get('content'))}")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UserError("the conversation has no user message")
    if training and "assistant" not in roles:
        raise UserError("the conversation has no assistant message: there is nothing to learn from it")


def _validate_assistant(message: dict[str, Any], where: str, training: bool) -> None:
    content = message.get("content")
    if isinstance(content, str):
        written = content
    elif isinstance(content, list):
        written = ""
        for number, part in enumerate(content, start=1):
            kind = part.get("type") if isinstance(part, dict) else None
            keys = {"text": "text", "search": "query", "documents": "documents"}
            key = keys.get(kind) if isinstance(kind, str) else None
            if key is None:
                raise UserError(f"{where}, part {number}: type {kind!r} is not one of text, search, documents")
            if key == "documents":
                _validate_documents(part.get(key), f"{where}, part {number}")
            elif not isinstance(part.get(key), str):
                raise UserError(f"{where}, part {number}: {key!r} is text, not {_kind(part.get(key))}")
            else:
                written += part[key]
    else:
        raise UserError(f"{where}: the content of an assistant message is text or a list, not {_kind(content)}")
    if training and not written.strip():
        raise UserError(f"{where}: the assistant message is empty")


def _validate_retrieval(message: dict[str, Any], where: str) -> None:
    if not message.get("multi_hop"):
        _validate_hop(message, where)
        return
    if not isinstance(message.get("hops"), list):
        raise UserError(f"{where}: a multi_hop retrieval message needs a list of hops")
    for number, hop in enumerate(message["hops"], start=1):
        if not isinstance(hop, dict):
            raise UserError(f"{where}, hop {number}: a hop is an object, not {_kind(hop)}")
        _validate_hop(hop, f"{where}, hop {number}")


def _validate_hop(hop: dict[str, Any], where: str) -> None:
    if not isinstance(hop.get("query", ""), (str, type(None))):
        raise UserError(f"{where}: 'query' is text, not {_kind(hop['query'])}")
    _validate_documents(hop.get("documents"), where)


def _validate_documents(documents: Any, where: str) -> None:
    if not isinstance(documents, (list, tuple)):
        raise UserError(f"{where}: 'documents' is a list, not {_kind(documents)}")
    for number, document in enumerate(documents, start=1):
        shown = _as_dict(document)
        if not isinstance(shown, dict) or not isinstance(shown.get("content"), str):
            raise UserError(f"{where}, document {number}: a document has its text under 'content'")
        if not isinstance(shown.get("title", ""), str):
            raise UserError(f"{where}, document {number}: 'title' is text, not {_kind(shown['title'])}")


def _as_dict(document: Any) -> Any:
    return document.to_dict() if hasattr(document, "to_dict") else document


def _kind(value: Any) -> str:
    kinds = {type(None): "missing", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return kinds.get(type(value), f"{value!r:.40}")


def _message_blocks(message: dict[str, Any]) -> list[tuple[Sequence[Any], str | None]]:
    """The retrieval blocks a message holds, as (documents, query)."""
    if message["role"] == "retrieval":
        hops = message["hops"] if message.get("multi_hop") else [message]
        return [(hop["documents"], hop.get("query")) for hop in hops]
    if message["role"] == "assistant" and isinstance(message["content"], list):
        return [(part["documents"], None) for part in message["content"] if part["type"] == "documents"]
    return []


def _segments(
    conversation: dict[str, Any], tokenizer: Tokenizer, max_doc_tokens: int
) -> tuple[list[_Segment], list[_Turn]]:
    """The conversation as the part that always stays (bos, system) and its turns. Each text is encoded once."""
    special = tokenizer.special_id
    head = [_Segment([special("<|bos|>")])]
    turns = [_Turn()]
    number = 1  # of the next document
    complete = False  # the current turn has its answer

    for message in conversation["messages"]:
        role = message["role"]
        if role == "system":
            head.append(_Segment(_framed("system", message["content"], tokenizer)))
            continue
        if complete:
            turns.append(_Turn())
        complete = role == "assistant"
        segments = turns[-1].segments
        if role == "user":
            segments.append(_Segment(_framed("user", message["content"], tokenizer)))
        elif role == "retrieval":
            for documents, query in _message_blocks(message):
                segments += _block(documents, query, tokenizer, number, max_doc_tokens)
                number += len(documents)
        else:
            segments.append(_Segment([special("<|assistant_start|>")]))
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    segments.append(_Segment(_encode(part["text"], tokenizer), learned=True))
                elif part["type"] == "search":
                    segments.append(_Segment(_framed("search", part["query"], tokenizer), learned=True))
                else:
                    segments += _block(part["documents"], None, tokenizer, number, max_doc_tokens)
                    number += len(part["documents"])
            segments.append(_Segment([special("<|assistant_end|>")], learned=True))
    return head, turns


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Text as tokens, with a space before its first word. BPE gives " Paris" and "Paris" different tokens; with it a
    word has the same tokens where an answer begins as inside a document, and copying it is copying tokens."""
    return tokenizer.encode(text if not text or text[0].isspace() else " " + text)


def _framed(kind: str, text: str, tokenizer: Tokenizer) -> list[int]:
    start, end = (tokenizer.special_id(f"<|{kind}_{edge}|>") for edge in ("start", "end"))
    return [start, *_encode(text, tokenizer), end]


def _block(
    documents: Sequence[Any], query: str | None, tokenizer: Tokenizer, first_number: int, max_doc_tokens: int
) -> list[_Segment]:
    special = tokenizer.special_id
    opening = [special("<|retrieval_start|>")]
    if query:
        opening += _framed("search", query, tokenizer)
    segments = [_Segment(opening)]
    for number, document in enumerate(documents, start=first_number):
        shown = _as_dict(document)
        name = shown.get("title", "").strip()
        title = _encode(name, tokenizer)[:MAX_TITLE_TOKENS]
        body = _encode(shown["content"], tokenizer)[:max_doc_tokens]
        # the number of "Route 6" is 6 2, not 62
        label = title + tokenizer.encode(f" {number}" if name[-1:].isnumeric() else str(number))
        ids = [special("<|doc_start|>"), *label, special("<|doc_body|>"), *body, special("<|doc_end|>")]
        segments.append(_Segment(ids, is_document=True))
    segments.append(_Segment([special("<|retrieval_end|>")]))
    return segments


def _fitting(documents: Iterable[_Segment], room: float) -> list[_Segment]:
    """The documents from the start on that fit the room; the first that does not ends it."""
    fitting = []
    for document in documents:
        room -= len(document.ids)
        if room < 0:
            break
        fitting.append(document)
    return fitting


def _assemble(
    head: list[_Segment], turns: list[_Turn], kept_turns: list[_Turn], kept_documents: list[_Segment]
) -> Rendered:
    kept = {id(document) for document in kept_documents}
    total_documents = sum(len(turn.documents) for turn in turns)
    rendered = Rendered([], [], total_documents - len(kept), [])
    for segment in [*head, *(segment for turn in kept_turns for segment in turn.segments)]:
        if segment.is_document:
            if id(segment) not in kept:
                continue
            rendered.document_spans.append((len(rendered.ids), len(rendered.ids) + len(segment.ids)))
        rendered.ids += segment.ids
        rendered.mask += [int(segment.learned)] * len(segment.ids)
    return rendered


# The same layout as a Jinja template, for transformers and vLLM (nanochat/hf_tokenizer.py). Messages are those of
# `render`; lengths are not limited.
CHAT_TEMPLATE = """\
{%- macro safe(text) -%}{{ text | replace("<|", "< |") }}{%- endmacro -%}
{%- macro spaced(text) -%}{% if text and not text[0].isspace() %} {% endif %}{{ safe(text) }}{%- endmacro -%}
{%- set count = namespace(documents=0) -%}
{%- macro block(documents, query) -%}
<|retrieval_start|>{% if query %}<|search_start|>{{ spaced(query) }}<|search_end|>{% endif %}
{%- for document in documents -%}
{%- set count.documents = count.documents + 1 -%}
{%- set title = (document.title or "").strip() -%}
<|doc_start|>{{ spaced(title) }}{% if title and title[-1].isnumeric() %} {% endif %}{{ count.documents -}}
<|doc_body|>{{ spaced(document.content) }}<|doc_end|>
{%- endfor -%}
<|retrieval_end|>
{%- endmacro -%}
<|bos|>
{%- for message in messages -%}
{%- if message.role == "system" -%}
<|system_start|>{{ spaced(message.content) }}<|system_end|>
{%- elif message.role == "user" -%}
<|user_start|>{{ spaced(message.content) }}<|user_end|>
{%- elif message.role == "retrieval" -%}
{%- for hop in (message.hops if message.multi_hop else [message]) -%}
{{ block(hop.documents, hop.query) }}
{%- endfor -%}
{%- elif message.role == "assistant" -%}
<|assistant_start|>
{%- if message.content is string -%}
{{ spaced(message.content) }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "text" -%}{{ spaced(part.text) }}
{%- elif part.type == "search" -%}<|search_start|>{{ spaced(part.query) }}<|search_end|>
{%- else -%}{{ block(part.documents, none) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|assistant_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant_start|>{%- endif -%}
"""
