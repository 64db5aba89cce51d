"""The index: every id is a document's, probabilities sum to 1, and the search is exhaustive scoring."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.dsi.docids import SCHEMES, DocIds, TermVectors, k_means
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.model import LMIndex, T5Index
from nanochat.dsi.trie import Trie
from nanochat.retrieval.document import Document
from tasks.example_world import generate_world

QUERIES = ["who was born in the old town?", "bridge", "the company that the baker works for"]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document.from_dict(one) for one in generate_world(60, seed=3).documents]


def make(documents, small_tokenizer, model: str, scheme: str = "semantic", noise: float = 0.3) -> SearchIndex:
    torch.manual_seed(0)
    size = small_tokenizer.vocab_size
    new = LMIndex.new(size, "MTMT", 64) if model == "lm" else T5Index.new(size, 32, layers=1, heads=2)
    index = SearchIndex.new(documents, small_tokenizer, new, scheme, branches=4)
    with torch.no_grad():
        for p in index.model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return index


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["t5", "lm"])
def test_a_search_is_exhaustive_scoring(documents, small_tokenizer, model, scheme):
    index = make(documents, small_tokenizer, model, scheme)
    names = list(index.ids.sequences)
    with torch.no_grad():
        all_scores = torch.stack([index.log_probs([query] * len(names), names) for query in QUERIES])
    assert torch.allclose(all_scores.exp().sum(1), torch.ones(3), atol=1e-4)
    found = index.search(QUERIES, 10, exact=True)
    for query, ranked in enumerate(found):
        order = sorted(range(len(names)), key=lambda at: -float(all_scores[query, at]))[:10]
        assert [id for id, _ in ranked] == [names[at] for at in order]
        assert np.allclose([score for _, score in ranked], all_scores[query][order], atol=1e-3)
    alone = [index.search([query], 10, exact=True)[0] for query in QUERIES]
    assert [[id for id, _ in one] for one in alone] == [[id for id, _ in one] for one in found]


def test_a_narrow_search_says_that_it_may_miss_some(documents, small_tokenizer, monkeypatch):
    import nanochat.dsi.index as module

    index = make(documents, small_tokenizer, "t5", "naive")
    monkeypatch.setattr(module, "WIDTH", 1)
    exact = index.search(QUERIES, 1, exact=True)
    names = list(index.ids.sequences)
    with torch.no_grad():
        best = [names[int(index.log_probs([query] * len(names), names).argmax())] for query in QUERIES]
    assert [ranked[0][0] for ranked in exact] == best
    greedy = index.search(QUERIES, 1)
    assert all(g[0][1] <= e[0][1] + 1e-5 for g, e in zip(greedy, exact, strict=True))


def test_a_search_among_some_finds_no_others(documents, small_tokenizer):
    index = make(documents, small_tokenizer, "t5")
    among = frozenset(document.id for document in documents[5:12])
    for ranked in index.search(QUERIES, 20, among):
        assert {id for id, _ in ranked} == among
    assert index.search(QUERIES, 5, frozenset()) == [[], [], []]


@pytest.mark.parametrize("model", ["t5", "lm"])
def test_saved_and_loaded_it_finds_the_same(documents, small_tokenizer, model, tmp_path):
    index = make(documents, small_tokenizer, model)
    index.save(tmp_path)
    again = SearchIndex.load(tmp_path)
    assert again.search(QUERIES, 7) == index.search(QUERIES, 7)
    (tmp_path / "index.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="weights cannot be read"):
        SearchIndex.load(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match="no search index"):
        SearchIndex.load(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["t5", "lm"])
def test_new_documents_get_ids_and_the_old_keep_theirs(documents, small_tokenizer, model, scheme):
    index = make(documents[:40], small_tokenizer, model, scheme)
    before = dict(index.ids.sequences)
    with torch.no_grad():
        old = index.model.target_logits([index.text("bridge")], [before[documents[0].id]])
    assert index.add(documents[30:]) == [document.id for document in documents[40:]]
    assert {id: index.ids.sequences[id] for id in before} == before and len(index) == len(documents)
    with torch.no_grad():
        new = index.model.target_logits([index.text("bridge")], [before[documents[0].id]])
    assert torch.allclose(new[..., : old.shape[-1]], old, atol=1e-5)
    assert {id for id, _ in index.search(["bridge"], 100)[0]} == {document.id for document in documents}


def test_alike_documents_begin_alike():
    topics = [
        ["river", "bridge", "water", "boat"],
        ["bread", "oven", "flour", "baker"],
        ["star", "moon", "sky", "night"],
    ]
    rng = np.random.default_rng(0)
    documents = [
        Document(f"{topic}/{n}", "", " ".join(rng.choice(words, 12)))
        for topic, words in enumerate(topics)
        for n in range(8)
    ]
    ids = DocIds("semantic", 500, 1, branches=3)
    ids.add(documents, lambda text: [], TermVectors.fit(documents))
    first = {topic: {ids.sequences[f"{topic}/{n}"][0] for n in range(8)} for topic in range(3)}
    assert all(len(tokens) == 1 for tokens in first.values()) and len(set.union(*first.values())) == 3
    new = Document("new", "", "the oven and the baker")
    ids.add([new], lambda text: [], TermVectors.fit(documents))
    assert ids.sequences["new"][0] in first[1]


def test_k_means_finds_what_is_apart():
    rng = np.random.default_rng(1)
    centres = np.linalg.qr(rng.standard_normal((8, 8)))[0][:3]
    vectors = np.repeat(centres, 20, 0) + rng.standard_normal((60, 8)) * 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, cluster = k_means(vectors.astype(np.float32), 3, rng)
    assert all(len(set(cluster[at : at + 20].tolist())) == 1 for at in (0, 20, 40)) and len(set(cluster.tolist())) == 3
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    same = np.ones((5, 4), np.float32) / 2
    assert sorted(k_means(same, 3, rng)[1].tolist())[0] == 0  # nothing to tell them apart by, and no error


def test_a_tree_of_ids():
    trie = Trie([(1, 2, 0), (1, 3, 0), (4, 0)])
    assert trie.allowed([0, trie.child(0, 1), trie.child(0, 4), -1], 5).nonzero().tolist() == [
        *([0, 1], [0, 4]),
        *([1, 2], [1, 3]),
        [2, 0],
        [3, 0],
    ]
    assert [len(trie.nodes(d)) for d in range(3)] == [3, 3, 2]
    for wrong in ([(1, 2), (1, 2)], [(1,), (1, 2)], [(1, 2), (1,)], [()]):
        with pytest.raises(ValueError):
            Trie(wrong)
    with pytest.raises(UserError, match="no scheme"):
        DocIds("semantics", 5, 1)
