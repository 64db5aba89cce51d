"""Search inside an answer: what the model writes between <|search_start|> and <|search_end|> is searched for, and what
was found stands right behind it as a retrieval block; then the model goes on, having read no token twice.

    searching = Searching(manager.search, top_k_per_hop=2, max_hops=4)
    text, info = engine.generate_from_conversation(conversation, searching=searching, max_tokens=128)
    info.hops[0].query, info.hops[0].documents, info.message

As in Search-R1 (Jin et al. 2025, arXiv 2503.09516) and IRCoT (Trivedi et al. 2022, arXiv 2212.10509), here for models
with states: a Mamba block cannot go back, so nothing is ever taken back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.conversation import answer_text, block_documents, count_documents, render_block
from nanochat.metrics import ABSTENTION
from nanochat.retrieval.document import Document
from nanochat.sampling import Sampling, TextStream
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Searching:
    """How an answer may search."""

    search: Callable[[list[str], int], list[list[Document]]]
    """(queries, top_k) -> the best documents of each, as RetrievalManager.search and every retriever do."""
    top_k_per_hop: int = 3
    """Documents shown after one search; those that the conversation has shown before do not count, nor come again."""
    max_hops: int = 4
    """Searches in one answer, at most."""
    at_limit: Literal["answer", "stop"] = "answer"
    """After max_hops: the model cannot begin another search, or its answer ends where it does."""
    max_doc_tokens: int = 500
    """Longest document; the rest is cut."""
    max_context: int | None = None
    """Tokens of prompt and answer together: documents that would go beyond are left out."""
    min_hops: int = 0
    """Searches before anything else may be written."""
    threshold: float | None = None
    """Before anything is written, and behind a search: search where the model gives it at least this probability, else
    write. None: as the model's tokens are drawn."""

    def __post_init__(self) -> None:
        for name in ("top_k_per_hop", "max_doc_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_hops < 0:
            raise UserError(f"max_hops is {self.max_hops}; it must be 0 or more")
        if not 0 <= self.min_hops <= self.max_hops:
            raise UserError(f"min_hops is {self.min_hops}; it must be from 0 to max_hops {self.max_hops}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"the threshold of a search is {self.threshold}; it must be from 0 to 1")


def _keep_or_drop(logits: Tensor, token: int, threshold: float) -> bool:
    """Leave of the logits (V,) this token alone, if it has at least this probability, else all others."""
    kept = bool(logits.float().softmax(0)[token] >= threshold)
    if kept:
        logits.fill_(-torch.inf)
    logits[token] = 0.0 if kept else -torch.inf
    return kept


@dataclass
class Hop:
    """One search of an answer."""

    query: str
    start: int
    """Where its <|search_start|> stands among the answer's ids; the block behind it ends at `end`."""
    end: int = 0
    documents: list[Document] = field(default_factory=list)
    search_seconds: float = 0.0
    read_seconds: float = 0.0


class Request:
    """One prompt on its way to an answer. `ids` grows by what the model writes, without its end token, and by what its
    searches find; mask says which is which (1: written)."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Tokenizer,
        searching: Searching | None = None,
        shown: Sequence[str] = (),
        documents_before: int = 0,
    ):
        """shown: ids of documents that the prompt has. documents_before: how many those are."""
        if not prompt:
            raise UserError("a prompt is empty")
        self.prompt, self.sampling, self.tokenizer, self.searching = list(prompt), sampling, tokenizer, searching
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.finish_reason = ""  # empty while it runs
        self.reused_tokens = 0
        self.hops: list[Hop] = []
        self.waiting = False  # for the documents of its last hop
        self._written = 0
        self._shown_before, self._documents_before = tuple(shown), documents_before
        self._shown, self._number = set(shown), documents_before
        self._opened: int | None = None  # where a search began that is not closed yet
        self._random = random.Random(sampling.seed)
        self._stops = TextStream(tokenizer, sampling.stop) if sampling.stop else None
        self._refusal = tokenizer.encode(f" {ABSTENTION}")[0]
        self._start, self._end = (tokenizer.special_id(f"<|search_{edge}|>") for edge in ("start", "end"))

    @classmethod
    def of_conversation(
        cls,
        conversation: dict[str, Any],
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Tokenizer,
        searching: Searching | None = None,
    ) -> Request:
        """prompt: the conversation rendered."""
        shown = [document["id"] for document in block_documents(conversation) if "id" in document]
        return cls(prompt, sampling, tokenizer, searching, shown, count_documents(conversation))

    def branch(self, hops: int, sampling: Sampling) -> Request:
        """Another answer that begins with this one's first so many searches and what they found."""
        new = Request(self.prompt, sampling, self.tokenizer, self.searching, self._shown_before, self._documents_before)
        end = self.hops[hops - 1].end if hops else 0
        new.ids, new.mask, new.hops = self.ids[:end], self.mask[:end], [replace(hop) for hop in self.hops[:hops]]
        shown = [document.id for hop in new.hops for document in hop.documents]
        new._shown.update(shown)
        new._number += len(shown)
        new._written = sum(new.mask)
        return new

    def goes_on_like(self, other: Request) -> bool:
        """Whether the other has the same tokens so far, and would go on in the same way if it drew the same ones."""
        return (
            self.ids == other.ids
            and self.prompt == other.prompt
            and replace(self.sampling, seed=0) == replace(other.sampling, seed=0)
            and self.searching == other.searching
            and (self._shown, self._number, self._written) == (other._shown, other._number, other._written)
        )

    @property
    def forbidden(self) -> list[int]:
        """Tokens that must not come next."""
        searching = self.searching
        full = searching is not None and searching.at_limit == "answer" and len(self.hops) >= searching.max_hops
        return [self._start] if full else []

    @property
    def required(self) -> int | None:
        """The token that must come next, if there is one."""
        searching = self.searching
        due = searching is not None and len(self.hops) < searching.min_hops and self._opened is None
        return self._start if due else None

    def decide(self, logits: Tensor) -> None:
        """By the thresholds, where there are any: at the beginning of what it says, leave of the logits (V,) a search
        or a refusal alone, or none."""
        ended = self.hops[-1].end if self.hops else 0
        if self._opened is not None or len(self.ids) != ended:
            return
        search = self.searching.threshold if self.searching is not None and not self.forbidden else None
        if search is not None and _keep_or_drop(logits, self._start, search):
            return
        if self.sampling.refusal_threshold is not None:
            _keep_or_drop(logits, self._refusal, self.sampling.refusal_threshold)

    def draw(self) -> float:
        return self._random.random() if self.sampling.temperature > 0 else 0.0

    def take(self, token: int, end: int) -> None:
        if token == end:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        self.mask.append(1)
        self._written += 1
        if self._stops is not None:
            self._stops.feed(token)
        if self._stops is not None and self._stops.stopped:
            self.finish_reason = "stop"
        elif self._written == self.sampling.max_tokens:
            self.finish_reason = "length"
        elif self.searching is not None:
            self._follow(token)

    def _follow(self, token: int) -> None:
        """Notice where a search begins and ends."""
        if token == self._start:
            self._opened = len(self.ids) - 1
            if len(self.hops) >= self.searching.max_hops:
                self.finish_reason = "hops"
        elif token == self._end and self._opened is not None:
            query = self.tokenizer.decode(self.ids[self._opened + 1 : -1]).strip()
            self.hops.append(Hop(query, self._opened))
            self._opened, self.waiting = None, True

    def show(self, documents: Sequence[Document]) -> list[int]:
        """The documents of the last hop: the tokens to read before the model goes on."""
        hop, limits = self.hops[-1], self.searching
        new = [document for document in documents if document.id not in self._shown][: limits.top_k_per_hop]
        while True:
            block = render_block(new, self.tokenizer, None, self._number + 1, limits.max_doc_tokens)
            used = len(self.prompt) + len(self.ids) + len(block)
            if not new or limits.max_context is None or used <= limits.max_context:
                break
            new = new[:-1]
        hop.documents, self._number = new, self._number + len(new)
        self._shown.update(document.id for document in new)
        to_read = [self.ids[-1], *block]  # the end of the search has not been read yet
        self.ids += block
        self.mask += [0] * len(block)
        hop.end, self.waiting = len(self.ids), False
        return to_read

    @property
    def answer(self) -> str:
        """The text, without searches and what they found."""
        return answer_text(self.ids, self.tokenizer)

    def message(self) -> dict[str, Any]:
        """The answer as an assistant message: its text, or with searches its parts in order."""
        if not self.hops:
            return {"role": "assistant", "content": self.answer}
        parts: list[dict[str, Any]] = []
        at = 0
        for hop in self.hops:
            parts += self._text(at, hop.start)
            parts.append({"type": "search", "query": hop.query})
            parts.append({"type": "documents", "documents": [document.to_dict() for document in hop.documents]})
            at = hop.end or len(self.ids)
        return {"role": "assistant", "content": parts + self._text(at, len(self.ids))}

    def _text(self, start: int, end: int) -> list[dict[str, Any]]:
        text = answer_text(self.ids[start:end], self.tokenizer)
        return [{"type": "text", "text": text}] if text else []


def look_up(rows: Sequence[Sequence[Request]]) -> list[list[int]]:
    """Search for what these requests wait for, all at once; those of a row for the same. What each row has to read."""
    found: dict[int, list[Document]] = {}
    groups: dict[Any, list[int]] = {}  # who has the same retriever
    for at, (request, *_) in enumerate(rows):
        if request.hops[-1].query:
            groups.setdefault(request.searching.search, []).append(at)
    for search, members in groups.items():
        began = time.perf_counter()
        leaders = [rows[at][0] for at in members]
        wanted = max(request.searching.top_k_per_hop + len(request._shown) for request in leaders)
        answers = search([request.hops[-1].query for request in leaders], wanted)
        seconds = time.perf_counter() - began
        for at, documents in zip(members, answers, strict=True):
            found[at] = documents
            for request in rows[at]:
                request.hops[-1].search_seconds = seconds
    blocks = []
    for at, row in enumerate(rows):
        for request in row:
            block = request.show(found.get(at, []))
        blocks.append(block)
    return blocks
