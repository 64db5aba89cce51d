"""A knowledge base against a plain dictionary: any adds, deletes, reopenings and rollbacks, in any order."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

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
    open_knowledge_base,
    rollback,
)

WORDS = ["baun", "caun", "dyun", "éun", "feun", "東", "the"]
IDS = [f"d{n}" for n in range(12)]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
some_documents = st.dictionaries(st.sampled_from(IDS), texts, max_size=5)


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.path = Path(tempfile.mkdtemp()) / "kb"
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

    @invariant()
    def holds_what_it_should(self):
        if hasattr(self, "expected"):
            knowledge_base = open_knowledge_base(self.path, verify=True)
            assert {document.id: document.content for document in knowledge_base.documents} == self.expected
            assert len(knowledge_base) == len(self.expected)


def as_documents(texts: dict[str, str]) -> list[Document]:
    return [Document(id, "", text) for id, text in texts.items()]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
