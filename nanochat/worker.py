"""Many answers at a time for a server: one thread decodes them together, whoever asks waits elsewhere.

worker = Worker(engine, max_rows=16, max_waiting=64)
ticket = worker.submit(request, on_event)     # on_event(Event) is called on the worker's thread
ticket.cancel()                               # its place is free after the token that is being drawn
worker.close()
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.engine import Batch, Engine
from nanochat.searching import Request


def what_failed(error: BaseException) -> str:
    """An error for a server's log: its kind and where it was raised, without its words, which may be a user's."""
    while getattr(error, "exceptions", ()):  # a group: its first
        error = error.exceptions[0]
    return f"{type(error).__name__}:\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()


class Busy(Exception):
    """As many requests are waiting as may wait."""


@dataclass(frozen=True)
class Event:
    """What is new of an answer."""

    ids: tuple[int, ...] = ()
    """Tokens, those that a search found among them."""
    finish_reason: str = ""
    """Set on the last event: as in engine.Generation, or "error"."""
    error: str = ""


class Ticket:
    """A request on its way."""

    def __init__(self, worker: Worker, request: Request, on_event: Callable[[Event], None]):
        self.request = request
        self._worker, self._on_event = worker, on_event
        self._given = 0

    def cancel(self) -> None:
        """Give it up; no more events come. Nothing happens if it has ended."""
        self._worker._cancel(self)

    def _tell(self, error: str = "") -> bool:
        """Pass on what is new; whether that was all."""
        new = tuple(self.request.ids[self._given :])
        self._given += len(new)
        reason = "error" if error else self.request.finish_reason
        if new or reason:
            try:
                self._on_event(Event(new, reason, error))
            except Exception as failure:  # of one listener: the others are told theirs
                print(what_failed(failure), file=sys.stderr, flush=True)
                self.cancel()
        return bool(reason)


class Worker:
    """max_rows: answers that are written at a time; max_waiting: requests that wait for a place, at most."""

    def __init__(self, engine: Engine, max_rows: int = 16, max_waiting: int = 64):
        self.engine, self.max_rows, self.max_waiting = engine, max_rows, max_waiting
        self._changed = threading.Condition()
        self._tickets: dict[int, Ticket] = {}  # by the id of the request
        self._new: list[Ticket] = []
        self._dropped: list[Ticket] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._tickets)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Raises Busy where too many wait."""
        ticket = Ticket(self, request, on_event)
        with self._changed:
            if self._closed or len(self._tickets) >= self.max_rows + self.max_waiting:
                raise Busy
            self._tickets[id(request)] = ticket
            self._new.append(ticket)
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Give everything up and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if self._tickets.pop(id(ticket.request), None) is not None:
                self._dropped.append(ticket)
                self._changed.notify()

    def _run(self) -> None:
        batch = Batch(self.engine, self.max_rows)
        while True:
            with self._changed:
                while not (self._new or self._dropped or self._closed or self._tickets):
                    self._changed.wait()
                if self._closed:
                    break
                new, dropped = self._new, self._dropped
                self._new, self._dropped = [], []
            try:
                for ticket in new:
                    batch.add(ticket.request)
                for ticket in dropped:
                    batch.drop(ticket.request)
                moved = batch.step()
            except Exception as error:  # the batch is in no state to go on: all hear of it, and the next begin anew
                print(what_failed(error), file=sys.stderr, flush=True)
                batch = Batch(self.engine, self.max_rows)
                self._fail(f"{type(error).__name__}: {error}")
                continue
            for request in moved:
                self._pass_on(request)
        self._fail("the server is stopping")

    def _pass_on(self, request: Request) -> None:
        with self._changed:
            ticket = self._tickets.get(id(request))
        if ticket is not None and ticket._tell():
            with self._changed:
                self._tickets.pop(id(request), None)

    def _fail(self, why: str) -> None:
        with self._changed:
            failed = [ticket for ticket in self._tickets.values() if ticket not in self._new]
            for ticket in failed:
                del self._tickets[id(ticket.request)]
            if self._closed:
                failed += self._new
                self._tickets.clear()
        for ticket in failed:
            ticket._tell(why)
