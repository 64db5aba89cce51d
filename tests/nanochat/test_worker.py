"""Answers of a worker are those of the engine alone, however many are written at a time and whoever leaves."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.searching import Request
from nanochat.worker import Busy, Event, Worker


@pytest.fixture(scope="module")
def engine(small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, "MT")
    with torch.no_grad():  # its answers go on and on
        model.lm_head.weight[Engine(model, small_tokenizer).end] = 0.0
    return Engine(model, small_tokenizer)


class Heard:
    """The events of one request."""

    def __init__(self):
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish_reason:
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [token for event in self.events for token in event.ids]


def request(engine: Engine, text: str, max_tokens: int = 12) -> Request:
    return Request(engine.tokenizer.encode(text), Sampling(max_tokens=max_tokens), engine.tokenizer)


def test_answers_are_those_of_one_at_a_time(engine):
    texts = [f"question {n} " * (1 + n % 5) for n in range(20)]
    expected = [list(engine.generate(engine.tokenizer.encode(text), max_tokens=12)) for text in texts]
    worker = Worker(engine, max_rows=3, max_waiting=40)
    heard = [Heard() for _ in texts]
    for text, one in zip(texts, heard, strict=True):
        worker.submit(request(engine, text), one)
    assert all(one.ended.wait(60) for one in heard)
    assert [one.ids for one in heard] == expected
    assert all(one.events[-1].finish_reason == "length" and len(one.events) == 12 for one in heard)
    worker.close()


def test_as_many_wait_as_may(engine):
    worker = Worker(engine, max_rows=1, max_waiting=1)
    first, second = Heard(), Heard()
    ticket = worker.submit(request(engine, "a b", 10_000), first)
    worker.submit(request(engine, "c d", 3), second)
    with pytest.raises(Busy):
        worker.submit(request(engine, "e f"), Heard())
    assert worker.load == 2 and not second.ended.wait(0.2)
    ticket.cancel()  # its place is free
    assert second.ended.wait(30)
    said = len(first.events)
    time.sleep(0.1)
    assert len(first.events) == said and not first.ended.is_set() and worker.load == 0
    ticket.cancel()  # nothing happens
    third = Heard()
    worker.submit(request(engine, "e f", 2), third)
    assert third.ended.wait(30)
    worker.close()


def test_a_failure_is_told_to_all_and_the_next_are_answered(engine, monkeypatch):
    worker = Worker(engine, max_rows=4)
    failing = threading.Event()
    read_next = engine.read_next

    def broken(*args):
        if failing.is_set():
            raise RuntimeError("no memory")
        return read_next(*args)

    monkeypatch.setattr(engine, "read_next", broken)
    heard = [Heard(), Heard()]
    for one in heard:
        worker.submit(request(engine, "a b", 100_000), one)
    while not all(one.events for one in heard):
        time.sleep(0.01)
    failing.set()
    assert all(one.ended.wait(30) and one.events[-1].error == "RuntimeError: no memory" for one in heard)
    failing.clear()
    after = Heard()
    worker.submit(request(engine, "a b", 3), after)
    assert after.ended.wait(30) and not after.events[-1].error
    worker.close()
    left = Heard()
    with pytest.raises(Busy):
        worker.submit(request(engine, "a b"), left)


def test_closing_ends_what_is_running(engine):
    worker = Worker(engine, max_rows=1)
    heard = [Heard(), Heard()]
    for one in heard:
        worker.submit(request(engine, "a b", 100_000), one)
    while not heard[0].events:
        time.sleep(0.01)
    worker.close()
    assert [one.events[-1].error for one in heard] == ["the server is stopping"] * 2
