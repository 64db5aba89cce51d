"""Inference: prefill in pieces, batched decoding with rows that come and go, streaming, reuse of what was read before,
searches that the model writes into its answer (nanochat/searching.py).

Rows are padded on the right and the padding leaves every state untouched, so a row's answer does not depend on the
rows beside it.

    engine = Engine(model, tokenizer)
    text, info = engine.generate_from_conversation(conversation, max_tokens=64)
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanochat.conversation import render_prompt
from nanochat.model.cache import Cache
from nanochat.model.lm import HybridLM
from nanochat.sampling import Sampling, TextStream, sample
from nanochat.searching import Hop, Request, Searching, look_up
from nanochat.tokenizer import Tokenizer


@dataclass
class Generation:
    """What came with an answer besides its text."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 for what the model wrote, 0 for what its searches found."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Tokens of the prompt whose state was still there from before."""
    finish_reason: str = "length"
    """"stop": the model ended its message, or wrote a stop text; "length": max_tokens reached; "hops": max_hops."""
    hops: list[Hop] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=dict)
    """The answer as the conversation's next message, with its searches and what they found."""
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, request: Request) -> Generation:
        return cls(
            request.ids,
            request.mask,
            len(request.prompt),
            request.reused_tokens,
            request.finish_reason,
            request.hops,
            request.message(),
        )


class PrefixCache:
    """States after prompts that were read, to go on from when a later prompt begins with the same tokens. The ones
    used longest ago go first when they take more than max_bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.states: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def longest(self, prompt: Sequence[int]) -> tuple[int, Cache] | None:
        """The longest state that leaves at least one token of the prompt to read, as a copy."""
        fitting = [ids for ids in self.states if len(ids) < len(prompt) and ids == tuple(prompt[: len(ids)])]
        if not fitting:
            return None
        ids = max(fitting, key=len)
        self.states.move_to_end(ids)
        return len(ids), self.states[ids].fork()

    def put(self, ids: Sequence[int], cache: Cache) -> None:
        """Keep a copy of a one-row cache that has read exactly these tokens."""
        self.states.pop(tuple(ids), None)
        self.states[tuple(ids)] = cache.fork()
        while self.nbytes > self.max_bytes:
            self.states.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.states.values())


Row = list[Request]  # that have the same tokens so far


class Batch:
    """Requests decoded together. New ones join between two steps, as soon as `join_at` of `max_rows` are free, and
    those that have ended leave: nobody waits for the longest answer (Orca, Yu et al. 2022). Requests that have the same
    tokens so far are one row, which is read and decoded once, until they draw different ones: several answers to one
    question cost little more than where they differ."""

    def __init__(self, engine: Engine, max_rows: int = 32, join_at: int = 1):
        """max_rows: requests on their way at a time, and so the most rows."""
        self.engine, self.max_rows, self.join_at = engine, max_rows, min(join_at, max_rows)
        self.waiting: deque[Request] = deque()
        self.running: list[Row] = []
        self.searching: list[tuple[list[Row], Cache]] = []  # rows that wait for documents, as they came
        self._cache: Cache | None = None
        self._last: Tensor | None = None  # the running rows' newest tokens, not read yet

    def add(self, request: Request) -> Request:
        self.waiting.append(request)
        return request

    @torch.inference_mode()
    def drop(self, request: Request) -> None:
        """Give a request up, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        for row in [*self.running, *(row for rows, _ in self.searching for row in rows)]:
            if request in row and len(row) > 1:
                row.remove(request)
                return
        for at, (rows, cache) in enumerate(self.searching):
            if [request] in rows:
                keep = [i for i, row in enumerate(rows) if row != [request]]
                rest = [([rows[i] for i in keep], cache.select(self._index(keep)))] if keep else []
                self.searching[at : at + 1] = rest
                return
        if [request] in self.running:
            self._leave([self.running.index([request])])

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One more token for every running request, or the first for those that join or have searched; returns those
        that got one. Empty when there is nothing left to do."""
        joining, resuming = [], []
        searching = sum(len(row) for rows, _ in self.searching for row in rows)
        free = self.max_rows - sum(map(len, self.running)) - searching
        if self.waiting and (not self.running or free >= self.join_at):
            joining = _rows([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
        if searching and (searching >= self.join_at or not (self.running or joining)):
            resuming, self.searching = self.searching, []
        parts = []  # caches and logits of the rows that go on, then of those that have searched or join
        if self.running:
            logits = self.engine.model(self._last.unsqueeze(-1), cache=self._cache, last_only=True)
            parts.append((self._cache, logits))
        if resuming:
            parts.append(self.engine.resume(resuming))
            self.running = self.running + [row for rows, _ in resuming for row in rows]
        if joining:
            parts += self.engine.prefill([row[0] for row in joining])
            self.running = self.running + joining
        if not self.running:
            return []
        self._cache = parts[0][0] if len(parts) == 1 else Cache.join([cache for cache, _ in parts])
        took = self._draw(torch.cat([logits for _, logits in parts]))
        waiting = [i for i, row in enumerate(self.running) if row[0].waiting and not row[0].finish_reason]
        if waiting:
            self.searching.append(([self.running[i] for i in waiting], self._cache.select(self._index(waiting))))
        self._leave([i for i, row in enumerate(self.running) if row[0].finish_reason or row[0].waiting])
        return took

    def _draw(self, logits: Tensor) -> list[Request]:
        """The next token of every request, from the logits (rows, V); rows whose requests draw different ones part."""
        for at, row in enumerate(self.running):
            if row[0].forbidden:
                logits[at, row[0].forbidden] = -torch.inf
        requests = [request for row in self.running for request in row]
        if len(requests) > len(self.running):
            logits = logits[self._index([at for at, row in enumerate(self.running) for _ in row])]
        seen = None
        if any(r.sampling.repetition_penalty != 1 for r in requests):
            seen = [r.prompt + r.ids for r in requests]
        drawn = iter(sample(logits, [r.sampling for r in requests], [r.draw() for r in requests], seen).tolist())
        kept: list[Row] = []
        parted: list[tuple[int, Row]] = []  # from which row
        last, last_parted = [], []
        for at, row in enumerate(self.running):
            by_token: dict[int, Row] = {}
            for request in row:
                by_token.setdefault(next(drawn), []).append(request)
            for token, members in by_token.items():
                for request in members:
                    request.take(token, self.engine.end)
                if len(kept) == at:
                    kept.append(members)
                    last.append(token)
                else:
                    parted.append((at, members))
                    last_parted.append(token)
        if parted:
            copies = self._cache.select(self._index([at for at, _ in parted]))
            self._cache = Cache.join([self._cache, copies])
        self.running = kept + [members for _, members in parted]
        self._last = self._index(last + last_parted)
        return requests

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.engine.model.device)

    def _leave(self, rows: list[int]) -> None:
        """Let these rows go; what they have read is kept for a prompt that goes on from there."""
        if not rows:
            return
        if self.engine.prefixes is not None and self._cache is not None:
            for row in rows:
                request, length = self.running[row][0], int(self._cache.lengths[row])
                if request.waiting:
                    continue
                state = self._cache.select(self._index([row]))
                self.engine.prefixes.put((request.prompt + request.ids)[:length], state)
        if len(rows) == len(self.running):
            self.running, self._cache, self._last = [], None, None
            return
        order = self._cache.drop(rows)
        self.running = [self.running[row] for row in order]
        self._last = self._last[self._index(order)]


def _rows(requests: Sequence[Request]) -> list[Row]:
    """Neighbours that begin alike stand in one row."""
    rows: list[Row] = []
    for request in requests:
        if rows and rows[-1][0].goes_on_like(request):
            rows[-1].append(request)
        else:
            rows.append([request])
    return rows


class Engine:
    """prefill_chunk: tokens of a prompt read at a time, which bounds memory. prefix_bytes: memory for states of what
    was read before, so that a follow-up question reads only what is new; 0 keeps none."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, prefill_chunk: int = 1024, prefix_bytes: int = 0):
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self.end = tokenizer.special_id("<|assistant_end|>")
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None

    def prefill(self, requests: Sequence[Request]) -> list[tuple[Cache, Tensor]]:
        """Read the prompts, and what an answer that branched off has of another. Caches and the logits (rows, V) after
        them, in the requests' order: all in one, or with reuse of prefixes one by one."""
        self.model.eval()
        if self.prefixes is None:
            cache = self.model.new_cache(len(requests))
            return [(cache, self._read(cache, [r.prompt + r.ids for r in requests]))]
        parts = []
        for request in requests:
            prompt = request.prompt + request.ids
            request.reused_tokens, cache = self.prefixes.longest(prompt) or (0, self.model.new_cache(1))
            # the documents are what the next question will share
            shared = self._end_of_documents(prompt)
            if request.reused_tokens < shared < len(prompt):
                self._read(cache, [prompt[request.reused_tokens : shared]])
                self.prefixes.put(prompt[:shared], cache)
            parts.append((cache, self._read(cache, [prompt[int(cache.lengths[0]) :]])))
        return parts

    def resume(self, groups: Sequence[tuple[list[Row], Cache]]) -> tuple[Cache, Tensor]:
        """Search for these rows and read what they found; their cache, and the logits after it."""
        rows = [row for members, _ in groups for row in members]
        blocks = look_up(rows)
        cache = Cache.join([cache for _, cache in groups])
        began = time.perf_counter()
        logits = self._read(cache, blocks)
        seconds = time.perf_counter() - began
        for request in (request for row in rows for request in row):
            request.hops[-1].read_seconds = seconds
        return cache, logits

    def _end_of_documents(self, prompt: list[int]) -> int:
        ends = {self.tokenizer.special_id(f"<|{name}_end|>") for name in ("retrieval", "system")}
        return next((i + 1 for i in range(len(prompt) - 1, -1, -1) if prompt[i] in ends), 0)

    def _read(self, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Feed rows of different length in pieces; the logits (rows, V) after each row's last token."""
        device = self.model.device
        sizes = torch.tensor([len(p) for p in prompts])
        longest = int(sizes.max())
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        ragged = bool((sizes < longest).any())
        tokens, sizes = tokens.to(device), sizes.to(device)
        out: Tensor | None = None
        for start in range(0, longest, self.prefill_chunk):
            piece = tokens[:, start : start + self.prefill_chunk]
            valid = (sizes - start).clamp(0, piece.shape[1]) if ragged else None
            logits = self.model(piece, cache=cache, valid=valid, last_only=True)
            # rows that had ended before this piece keep theirs
            out = torch.where((valid > 0).unsqueeze(-1), logits, out) if ragged and start else logits
        return out

    def generate(self, prompt: Sequence[int], **settings) -> Iterator[int]:
        """Stream the new tokens of one prompt; the end token is not among them. settings: those of Sampling."""
        yield from self.stream(Request(prompt, Sampling(**settings), self.tokenizer))

    def stream(self, request: Request) -> Iterator[int]:
        """The request's new tokens as they come; those that its searches find are among them."""
        batch = Batch(self, max_rows=1)
        batch.add(request)
        given = 0
        try:
            while batch.step():
                yield from request.ids[given:]
                given = len(request.ids)
        finally:
            batch.drop(request)  # closed before its end: what was read is kept all the same

    def generate_batch(self, prompts: Sequence[Sequence[int]], batch_size: int = 32, **settings) -> list[list[int]]:
        """New tokens of each prompt, in the prompts' order. settings: those of Sampling; the i-th prompt's seed is
        seed + i. Prompts of similar length are read together."""
        sampling = Sampling(**settings)
        requests = [
            Request(prompt, replace(sampling, seed=sampling.seed + i), self.tokenizer)
            for i, prompt in enumerate(prompts)
        ]
        self.run(requests, batch_size)
        return [r.ids for r in requests]

    def run(self, requests: Sequence[Request], batch_size: int = 32) -> None:
        """All of them to their ends. Prompts of similar length are read together."""
        batch = Batch(self, batch_size, join_at=max(1, batch_size // 2))
        for request in sorted(requests, key=lambda r: len(r.prompt) + len(r.ids)):
            batch.add(request)
        while batch.step():
            pass

    def stream_text(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as it becomes whole: bytes of a character split over tokens wait for the rest."""
        stream = TextStream(self.tokenizer)
        for token in ids:
            if text := stream.feed(token):
                yield text
        if text := stream.feed(None):
            yield text

    def generate_from_conversation(
        self,
        conversation: dict,
        max_prompt_tokens: int | None = None,
        max_doc_tokens: int = 500,
        searching: Searching | None = None,
        **settings,
    ) -> tuple[str, Generation]:
        """The assistant's answer to a conversation whose last message is not the assistant's, and how it came about.
        searching: let it search. settings: those of Sampling."""
        sampling = Sampling(**settings)
        prompt = render_prompt(conversation, self.tokenizer, max_prompt_tokens, max_doc_tokens)
        request = Request.of_conversation(conversation, prompt, sampling, self.tokenizer, searching)
        began, first = time.perf_counter(), 0.0
        for _ in self.stream(request):
            first = first or time.perf_counter() - began
        info = Generation.of(request)
        info.seconds = time.perf_counter() - began
        info.first_token_seconds = first or info.seconds
        return _before(request.answer, sampling.stop), info

    def generate_from_conversations(
        self,
        conversations: Sequence[dict],
        batch_size: int = 32,
        max_prompt_tokens: int | None = None,
        max_doc_tokens: int = 500,
        searching: Searching | None = None,
        **settings,
    ) -> list[tuple[str, Generation]]:
        """The same for many at once, each at its own point; the i-th conversation's seed is seed + i."""
        sampling = Sampling(**settings)
        requests = []
        for i, conversation in enumerate(conversations):
            prompt = render_prompt(conversation, self.tokenizer, max_prompt_tokens, max_doc_tokens)
            own = replace(sampling, seed=sampling.seed + i)
            requests.append(Request.of_conversation(conversation, prompt, own, self.tokenizer, searching))
        self.run(requests, batch_size)
        return [(_before(r.answer, sampling.stop), Generation.of(r)) for r in requests]


def _before(text: str, stop: Sequence[str]) -> str:
    """Text up to the first of the stop texts."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))].rstrip()
