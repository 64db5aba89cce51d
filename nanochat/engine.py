"""Inference: prefill in pieces, batched decoding with rows that come and go, streaming, reuse of what was read before,
searches that the model writes into its answer (nanochat/searching.py).

Rows are padded on the right and the padding leaves every state untouched, so a row's answer does not depend on the
rows beside it.

    engine = Engine(model, tokenizer)
    text, info = engine.generate_from_conversation(conversation, max_tokens=64)
"""

from __future__ import annotations

import contextlib
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
        self.max_bytes, self.nbytes = max_bytes, 0
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
        self._drop(tuple(ids))
        state = cache.fork()
        self.states[tuple(ids)] = state
        self.nbytes += state.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self.states)))

    def _drop(self, ids: tuple[int, ...]) -> None:
        if ids in self.states:
            self.nbytes -= self.states.pop(ids).nbytes


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
        self.searching: list[Row] = []  # that wait for documents
        self._cache: Cache | None = None  # of the running rows, then of those that wait
        self._last: list[int] = []  # the running rows' newest tokens, not read yet

    def add(self, request: Request) -> Request:
        self.waiting.append(request)
        return request

    @torch.inference_mode()
    def drop(self, request: Request) -> None:
        """Give a request up, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        R = len(self.running)
        for at, row in enumerate([*self.running, *self.searching]):
            if request in row:
                if row == [request] and at < R:
                    self._keep(at, request)
                row.remove(request)
                running = [(at, row, last) for at, (row, last) in enumerate(zip(self.running, self._last, strict=True))]
                searching = list(enumerate(self.searching, R))
                self._arrange([place for place in running if place[1]], [place for place in searching if place[1]])
                return

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One more token for every running request, or the first for those that join or have searched; returns those
        that got one. Empty when there is nothing left to do."""
        joining: list[Row] = []
        searching = sum(map(len, self.searching))
        free = self.max_rows - sum(map(len, self.running)) - searching
        if self.waiting and (not self.running or free >= self.join_at):
            joining = _rows([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
        R, held = len(self.running), len(self.running) + len(self.searching)
        # rows with their places in the cache: those that get a token, in the order of their logits, and those that wait
        going, staying = list(enumerate(self.running)), list(enumerate(self.searching, R))
        logits = []
        if going:
            logits.append(self.engine.read_next(self._last, self._cache.rows(0, R, room=1)))
        if staying and (searching >= self.join_at or not (going or joining)):
            logits += self._resume()
            going, staying = going + list(enumerate(self.searching, R)), []
        if joining:
            for cache, after in self.engine.prefill([row[0] for row in joining]):
                logits.append(after)
                if self._cache is None:
                    self._cache = cache
                else:
                    self._cache.append(cache)
            going += enumerate(joining, held)
        if not going:
            return []
        requests = [request for _, row in going for request in row]
        running = []
        for at, row, token in self._draw(torch.cat(logits), going):
            if row[0].waiting and not row[0].finish_reason:
                staying.append((at, row))
            elif row[0].finish_reason:
                self._keep(at, row[0])
            else:
                running.append((at, row, token))
        self._arrange(running, staying)
        return requests

    def _resume(self) -> list[Tensor]:
        """Search for all rows that wait and read what was found; the logits after it."""
        R, blocks = len(self.running), look_up(self.searching)
        began = time.perf_counter()
        # rows that read as much stand side by side
        order = sorted(range(len(blocks)), key=lambda at: len(blocks[at]))
        self._cache.arrange([*range(R), *(R + at for at in order)])
        self.searching = [self.searching[at] for at in order]
        logits = []
        for start, end in self.engine.groups([len(blocks[at]) for at in order]):
            to_read = [blocks[at] for at in order[start:end]]
            logits.append(self.engine.read(self._cache.rows(R + start, R + end, room=len(to_read[-1])), to_read))
        seconds = time.perf_counter() - began
        for request in (request for row in self.searching for request in row):
            request.hops[-1].read_seconds = seconds
        return logits

    def _draw(self, logits: Tensor, places: list[tuple[int, Row]]) -> list[tuple[int, Row, int]]:
        """The next token of every request, from the logits (rows, V): rows with their places and tokens. Rows whose
        requests draw different ones part, and the parts have the same place."""
        rows = [row for _, row in places]
        for at, row in enumerate(rows):
            row[0].decide(logits[at])
            if row[0].forbidden:
                logits[at, row[0].forbidden] = -torch.inf
            if (token := row[0].required) is not None:
                logits[at] = -torch.inf
                logits[at, token] = 0.0
        requests = [request for row in rows for request in row]
        if len(requests) > len(rows):
            logits = logits[[at for at, row in enumerate(rows) for _ in row]]
        seen = None
        if any(r.sampling.repetition_penalty != 1 for r in requests):
            seen = [r.prompt + r.ids for r in requests]
        drawn = iter(sample(logits, [r.sampling for r in requests], [r.draw() for r in requests], seen).tolist())
        parts = []
        for place, row in places:
            by_token: dict[int, Row] = {}
            for request in row:
                by_token.setdefault(next(drawn), []).append(request)
            for token, members in by_token.items():
                for request in members:
                    request.take(token, self.engine.end)
                parts.append((place, members, token))
        return parts

    def _keep(self, place: int, request: Request) -> None:
        """What a row that leaves has read, for a prompt that goes on from there."""
        if self.engine.prefixes is not None:
            state = self._cache.select(torch.tensor([place], device=self.engine.model.device))
            self.engine.prefixes.put((request.prompt + request.ids)[: state.max_length], state)

    def _arrange(self, running: list[tuple[int, Row, int]], searching: list[tuple[int, Row]]) -> None:
        """Only these rows are left; the running ones stand first in the cache."""
        running, searching = _settled(running, 0), _settled(searching, len(running))
        self.running = [row for _, row, _ in running]
        self._last = [token for _, _, token in running]
        self.searching = [row for _, row in searching]
        order = [place[0] for place in (*running, *searching)]
        if not order:
            self._cache = None
        elif order != list(range(len(self._cache))):
            self._cache.arrange(order)


def _settled(places: list, first: int) -> list:
    """The same in an order for the places from `first` on, in which those that can do stay where they are."""
    settled, moving = [None] * len(places), []
    for place in places:
        at = place[0] - first
        if 0 <= at < len(places) and settled[at] is None:
            settled[at] = place
        else:
            moving.append(place)
    rest = iter(moving)
    return [next(rest) if place is None else place for place in settled]


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
    """prefill_chunk: tokens read at a time, of one row or of several together, which bounds memory; by default as many
    as keep a processor (4,096) or a GPU (16,384) busy. prefix_bytes: memory for states of what was read
    before, so that a follow-up question reads only what is new; 0 keeps none."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, prefill_chunk: int | None = None, prefix_bytes: int = 0):
        self.model, self.tokenizer = model, tokenizer
        self.prefill_chunk = prefill_chunk or (4096 if model.device.type == "cpu" else 16_384)
        self.end = tokenizer.special_id("<|assistant_end|>")
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None

    def prefill(self, requests: Sequence[Request]) -> list[tuple[Cache, Tensor]]:
        """Read the prompts, and what an answer that branched off has of another. Caches and the logits (rows, V) after
        them, in the requests' order."""
        self.model.eval()
        parts = []
        if self.prefixes is None:
            prompts = [request.prompt + request.ids for request in requests]
            for start, end in self.groups([len(prompt) for prompt in prompts]):
                cache = self.model.new_cache(end - start)
                parts.append((cache, self.read(cache, prompts[start:end])))
            return parts
        for request in requests:
            prompt = request.prompt + request.ids
            request.reused_tokens, cache = self.prefixes.longest(prompt) or (0, self.model.new_cache(1))
            # the documents are what the next question will share
            shared = self._end_of_documents(prompt)
            if request.reused_tokens < shared < len(prompt):
                self.read(cache, [prompt[request.reused_tokens : shared]])
                self.prefixes.put(prompt[:shared], cache)
            parts.append((cache, self.read(cache, [prompt[int(cache.lengths[0]) :]])))
        return parts

    def read_next(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Read one token in each row; the logits (rows, V) after it. On a CPU in the weights' type, also under
        autocast: casting all weights takes longer than one token's products."""
        read = torch.tensor(tokens, device=self.model.device).unsqueeze(-1)
        on_cpu = self.model.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            return self.model(read, cache=cache, last_only=True)

    def groups(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Neighbours (start, end) to be read together: as many as prefill_chunk allows, padded to the longest."""
        start, longest = 0, 0
        for at, size in enumerate(sizes):
            longest = max(longest, size)
            if at > start and longest * (at + 1 - start) > self.prefill_chunk:
                yield start, at
                start, longest = at, size
        yield start, len(sizes)

    def _end_of_documents(self, prompt: list[int]) -> int:
        ends = {self.tokenizer.special_id(f"<|{name}_end|>") for name in ("retrieval", "system")}
        return next((i + 1 for i in range(len(prompt) - 1, -1, -1) if prompt[i] in ends), 0)

    def read(self, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
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
