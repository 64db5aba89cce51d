"""A search index as a retriever: the contract that every retriever keeps, and learning when documents are added."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import UserError
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.model import T5Index
from nanochat.dsi.training import learn
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import add_documents, build_knowledge_base, delete_documents
from tasks.example_world import generate_world

QUERIES = ["who was born in the old town?", "bridge", "the company that the baker works for"]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document.from_dict(one) for one in generate_world(40, seed=3).documents]


@pytest.fixture
def index(documents, small_tokenizer) -> SearchIndex:
    """Of random weights, that knows the first 30."""
    torch.manual_seed(0)
    model = T5Index.new(small_tokenizer.vocab_size, 32, layers=1, heads=2)
    made = SearchIndex.new(documents[:30], small_tokenizer, model, "semantic", branches=4)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return made


def hits(retriever, top_k=10):
    return [[(d.id, round(d.score, 5)) for d in found] for found in retriever.search(QUERIES, top_k)]


def test_scores_are_probabilities_of_those_that_are_there(documents, index):
    retriever = create_retriever("dsi", index=index, epochs=0)
    retriever.add(documents)
    found = retriever.search(QUERIES, 100)
    known = {document.id for document in documents[:30]}
    for query, one in zip(QUERIES, found, strict=True):
        assert {document.id for document in one} == known  # nothing else is known
        assert sum(document.score for document in one) == pytest.approx(1, abs=1e-4)
        ids = [document.id for document in one] + [documents[35].id]
        assert retriever.score(query, ids) == pytest.approx([*(d.score for d in one), 0.0], abs=1e-5)
    retriever.delete([found[0][0].id])
    left = retriever.search(QUERIES[:1], 100)[0]
    assert {document.id for document in left} == known - {found[0][0].id}
    assert sum(document.score for document in left) == pytest.approx(1, abs=1e-4)


def test_a_filter_leaves_out_and_the_rest_are_ranked_as_alone(documents, index):
    marked = [Document(d.id, d.title, d.content, metadata={"half": n % 2}) for n, d in enumerate(documents)]
    retriever = create_retriever("dsi", index=index, epochs=0)
    retriever.add(marked)
    alone = create_retriever("dsi", index=index, epochs=0)
    alone.add(marked[::2])
    filtered = retriever.search(QUERIES, 10, where={"half": 0})
    assert [[d.id for d in one] for one in filtered] == [[id for id, _ in one] for one in hits(alone)]


def test_saved_loaded_and_changed_it_is_as_built_afresh(documents, index, tmp_path):
    path = tmp_path / "kb"
    build_knowledge_base(documents[:20], path, "dsi", index=index, epochs=0)
    add_documents(path, documents[20:30])
    delete_documents(path, [documents[4].id])
    fresh = create_retriever("dsi", index=index, epochs=0)
    fresh.add([*documents[:4], *documents[5:30]])
    manager = RetrievalManager(knowledge_base_path=path)
    assert hits(manager) == hits(fresh)


def test_new_documents_are_learned_and_old_ones_rehearsed(documents, small_tokenizer, capsys):
    torch.manual_seed(0)
    model = T5Index.new(small_tokenizer.vocab_size, 48, layers=1, heads=2)
    index = SearchIndex.new(documents[:8], small_tokenizer, model, "atomic")
    said = learn(index, documents[:8], [], 150, rows_per_step=16)
    assert "learned 8 new documents" in said
    retriever = create_retriever("dsi", index=index, epochs=150)
    retriever.add(documents[:8])
    assert not capsys.readouterr().out  # all known
    retriever.add(documents[8:12])
    assert "learned 4 new documents" in capsys.readouterr().out
    titles = [document.title for document in documents[:12]]
    right = [
        found[0].id == document.id for found, document in zip(retriever.search(titles, 1), documents, strict=False)
    ]
    assert sum(right[:8]) >= 7 and sum(right[8:]) >= 3


def test_without_an_index_it_says_what_to_do(documents, tmp_path):
    with pytest.raises(UserError, match=r"scripts\.dsi_train"):
        create_retriever("dsi").add(documents)
    with pytest.raises(UserError, match="no search index"):
        create_retriever("dsi", index=tmp_path)
