"""A knowledge base against a plain dictionary: any adds, deletes, reopenings, rollbacks and crashes, in any order."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager, blocks, collection
from nanochat.retrieval.knowledge_base import (
    add_documents,
    build_knowledge_base,
    delete_documents,
    live_version,
    open_knowledge_base,
    rollback,
)

WORDS = ["baun", "caun", "dyun", "éun", "feun", "東", "the"]
IDS = [f"d{n}" for n in range(12)]
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would take most of the time to flush
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
some_documents = st.dictionaries(st.sampled_from(IDS), texts, max_size=5)


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=MEMORY)) / "kb"
        self.tier, collection.TIER = collection.TIER, 3  # so that a short life has merges
        self.block, blocks.BLOCK = blocks.BLOCK, 2

    def teardown(self):
        collection.TIER, blocks.BLOCK = self.tier, self.block
        shutil.rmtree(self.path.parent)

    @initialize(new=some_documents, kind=st.sampled_from(["simple", "bm25"]))
    def begin(self, new, kind):
        self.kind, self.before = kind, None
        build_knowledge_base(as_documents(new), self.path, kind)
        self.expected = dict(new)
        self.open = None

    def change(self, after):
        self.before, self.expected = self.expected, after

    @rule(new=some_documents)
    def add(self, new):
        add_documents(self.path, as_documents(new))
        self.change(self.expected | new)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def delete(self, data):
        gone = data.draw(st.sets(st.sampled_from(sorted(self.expected)), min_size=1))
        delete_documents(self.path, gone)
        self.change({id: text for id, text in self.expected.items() if id not in gone})

    @rule(id=st.sampled_from(IDS))
    def delete_what_is_not_there(self, id):
        if id not in self.expected:
            with pytest.raises(UserError, match=id):
                delete_documents(self.path, [id])

    @rule(new=some_documents)
    def build_anew(self, new):
        build_knowledge_base(as_documents(new), self.path, self.kind)
        self.change(dict(new))

    @precondition(lambda self: self.before is not None)
    @rule()
    def roll_back(self):
        rollback(self.path)
        self.change(self.before)

    @rule(moment=st.integers(1, 60) | st.sampled_from(["rename", "replace"]), new=some_documents, data=st.data())
    def crash(self, moment, new, data):
        """Any change stops before its moment-th call that changes the disk, or its first of that name; what is
        committed by then, and only that, has happened."""
        gone = data.draw(st.sets(st.sampled_from(sorted(self.expected)), min_size=1)) if self.expected else set()
        changes = {
            "add": (lambda: add_documents(self.path, as_documents(new)), self.expected | new),
            "build": (lambda: build_knowledge_base(as_documents(new), self.path, self.kind), dict(new)),
        }
        if gone:
            left = {id: text for id, text in self.expected.items() if id not in gone}
            changes["delete"] = (lambda: delete_documents(self.path, gone), left)
        if self.before is not None:
            changes["rollback"] = (lambda: rollback(self.path), self.before)
        change, after = changes[data.draw(st.sampled_from(sorted(changes)))]
        live = live_version(self.path)
        with contextlib.suppress(Crash), dead_from(moment):
            change()
        if live_version(self.path) != live:
            self.change(after)

    @rule()
    def reopen(self):
        """A reader stays with the version that it has opened, until it opens another."""
        self.open = (RetrievalManager(knowledge_base_path=self.path).retriever, self.expected)

    @precondition(lambda self: getattr(self, "open", None))
    @rule(query=texts)
    def search_the_open_one(self, query):
        retriever, expected = self.open
        fresh = RetrievalManager(self.kind, documents=as_documents(expected)).retriever
        assert retriever.search([query], 15) == fresh.search([query], 15)

    @rule(query=texts, top_k=st.integers(1, 15))
    def search(self, query, top_k):
        manager = RetrievalManager(knowledge_base_path=self.path)
        fresh = RetrievalManager(self.kind, documents=as_documents(self.expected))
        found = manager.retrieve(query, top_k)
        assert found == fresh.retrieve(query, top_k)
        wanted = Counter(manager.retriever.analyzer.terms(query))
        matching = {
            id for id, text in self.expected.items() if wanted & Counter(manager.retriever.analyzer.terms(text))
        }
        assert {document.id for document in found} <= matching
        assert len(found) == min(top_k, len(matching))
        if self.kind == "bm25":
            scores = slow_bm25(self.expected, query, manager.retriever.analyzer.terms)
            best = sorted(matching, key=lambda id: (-round(scores[id], 9), id))[:top_k]
            assert [document.id for document in found] == best
            assert [document.score for document in found] == pytest.approx([scores[id] for id in best])

    @invariant()
    def holds_what_it_should(self):
        if hasattr(self, "expected"):
            knowledge_base = open_knowledge_base(self.path, verify=True)
            assert {document.id: document.content for document in knowledge_base.documents} == self.expected
            assert len(knowledge_base) == len(self.expected)


class Crash(BaseException):
    """The process is dead: nothing catches this, and what would clean up does not come to it."""


@contextlib.contextmanager
def dead_from(moment: int | str) -> Iterator[None]:
    """From the moment-th call on that changes the disk, or flushes it, or the first of that name, none does a thing."""
    calls, dead = itertools.count(1), False

    def dying(name, original):
        def call(*args, **kwargs):
            nonlocal dead
            dead = dead or moment in (name, next(calls))
            if dead:
                raise Crash
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir"):
            stack.enter_context(mock.patch.object(os, name, dying(name, getattr(os, name))))
        yield


def slow_bm25(texts: dict[str, str], query: str, terms) -> dict[str, float]:
    """The formula, word by word."""
    counts = {id: Counter(terms(text)) for id, text in texts.items()}
    N, mean = len(texts), sum(map(Counter.total, counts.values())) / max(len(texts), 1)
    scores = dict.fromkeys(texts, 0.0)
    for term in terms(query):
        n = sum(term in of for of in counts.values())
        for id, of in counts.items():
            if term in of:
                idf = math.log(1 + (N - n + 0.5) / (n + 0.5))
                scores[id] += idf * of[term] / (of[term] + 1.5 * (1 - 0.75 + 0.75 * of.total() / mean))
    return scores


def as_documents(texts: dict[str, str]) -> list[Document]:
    return [Document(id, "", text) for id, text in texts.items()]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
