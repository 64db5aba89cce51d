"""simple and bm25: their scores against a slow, obvious reference and other people's programs."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, blocks
from tests.nanochat.retrieval.samples import QUERIES, hits, make, random_documents

LEXICAL = ["simple", "bm25"]


@pytest.mark.parametrize("kind", LEXICAL)
def test_unknown_words_find_nothing_and_no_hit_scores_zero(kind):
    retriever = make(kind)
    retriever.add(random_documents(100))
    retriever.add([Document("only", "", "singular")])
    found = hits(retriever, ["zzz", "qqq the of", "singular zzz", "baun"], top_k=200)
    assert found[0] == found[1] == []
    assert [id for id, _ in found[2]] == ["only"]
    assert found[3] and all(score > 0 for _, score in found[3])
    retriever.delete(["only"])
    assert hits(retriever, ["singular"]) == [[]]


@pytest.mark.parametrize("kind", LEXICAL)
def test_documents_without_any_term(kind):
    retriever = make(kind)
    retriever.add([Document("a", "", "the of and"), Document("b", "", "!!!"), Document("c", "", "baun")])
    assert [id for id, _ in hits(retriever, ["the baun"])[0]] == ["c"]
    retriever.delete(["c"])
    assert hits(retriever, ["the baun"]) == [[]]


@pytest.mark.parametrize("block", [blocks.BLOCK, 300])
@pytest.mark.parametrize("kind", LEXICAL)
def test_compiled_search_equals_numpy(kind, block, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(blocks, "BLOCK", block)
    retriever = make(kind)
    documents = random_documents(3000, words=60)
    retriever.add(documents[:2500])
    retriever.add(documents[2500:])
    retriever.delete([document.id for document in documents[::7]])
    queries = [" ".join(document.content.split()[:6]) for document in documents[:300]]
    found = []
    for compiled in (False, True):
        retriever.compiled = compiled
        found.append(hits(retriever, queries, 20))
    assert found[0] == found[1]
    some = [id for id, _ in found[0][0]][::-1]
    assert retriever.score(queries[0], some) == pytest.approx([score for _, score in found[0][0]][::-1], abs=0)
    assert found[0] == hits(retriever, queries, 20)


def test_what_is_remembered_of_words_has_a_limit(monkeypatch):
    monkeypatch.setattr("nanochat.retrieval.lexical._MOST_WORDS", 50)
    retriever, fresh = make("bm25"), make("bm25")
    for each in (retriever, fresh):
        each.add(random_documents(100))
    for number in range(300):
        query = f"baun typo{number} {QUERIES[number % 5]}"
        assert hits(retriever, [query]) == hits(fresh, [query.replace(f"typo{number}", "")])
        assert retriever._terms is None or len(retriever._terms.numbers) < 50


def test_the_title_counts_as_often_as_asked():
    documents = [Document("title", "baun", "caun dyun"), Document("content", "caun", "baun dyun")]
    for weight, expected in ((0, {"content"}), (3, {"title", "content"})):
        retriever = make("bm25", title_weight=weight)
        retriever.add(documents)
        assert {id for id, _ in hits(retriever, ["baun"])[0]} == expected
    assert hits(retriever, ["baun"])[0][0][0] == "title"
    repeated = make("bm25")
    repeated.add([Document(d.id, f"{d.title} {d.title} {d.title}", d.content) for d in documents])
    assert hits(repeated, ["baun caun"]) == hits(retriever, ["baun caun"])


@pytest.mark.parametrize("variant", ["lucene", "okapi"])
def test_variants_equal_bm25s(variant):
    bm25s = pytest.importorskip("bm25s")
    documents = random_documents(200)
    retriever = make("bm25", variant=variant)
    retriever.add(documents)
    terms = retriever.analyzer.terms
    method = "lucene" if variant == "lucene" else "robertson"
    oracle = bm25s.BM25(method=method, k1=1.5, b=0.75)
    oracle.index([terms(f"{document.title}\n{document.content}") for document in documents], show_progress=False)
    for query in ("baun", "beun caun", "cyun feun giun houn"):
        found = retriever.score(query, [document.id for document in documents])
        np.testing.assert_allclose(found, oracle.get_scores(terms(query)), rtol=1e-5, atol=1e-6)
        assert all(document.score > 0 for document in retriever.search([query], 200)[0])


def test_the_package_rank_bm25_as_backend():
    rank_bm25 = pytest.importorskip("rank_bm25")
    documents = random_documents(100)
    retriever = make("bm25", bm25_backend="rank_bm25")
    retriever.add(documents[:60])
    retriever.add(documents[60:])
    retriever.delete([documents[0].id])
    kept = sorted(documents[1:], key=lambda document: document.id)
    terms = retriever.analyzer.terms
    oracle = rank_bm25.BM25Okapi([terms(f"{d.title}\n{d.content}") for d in kept], k1=1.5, b=0.75)
    for query in ("cyun", "diun feun"):
        scores = oracle.get_scores(terms(query))
        expected = sorted(((-score, d.id) for score, d in zip(scores, kept, strict=True) if score > 0))[:10]
        assert [id for id, _ in hits(retriever, [query])[0]] == [id for _, id in expected]


def slow_bm25(documents, query, analyzer, k1=1.5, b=0.75):
    """The formula, with dictionaries."""
    terms = {document.id: Counter(analyzer.terms(document.title + "\n" + document.content)) for document in documents}
    mean_length = sum(sum(counts.values()) for counts in terms.values()) / len(documents)
    scores = {}
    for id, counts in terms.items():
        score = 0.0
        for term in analyzer.terms(query):
            n = sum(term in other for other in terms.values())
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            f = counts[term]
            score += idf * f / (f + k1 * (1 - b + b * sum(counts.values()) / mean_length)) if f else 0
        scores[id] = score
    ranked = sorted(scores.items(), key=lambda hit: (-round(hit[1], 9), hit[0]))
    return [(id, score) for id, score in ranked if score > 0]


@pytest.mark.parametrize("settings", [{}, {"k1": 0.9, "b": 0.4}, {"k1": 1.2, "b": 0.0}, {"k1": 0.0}, {"stem": False}])
def test_bm25_equals_the_formula(settings):
    documents = random_documents(60)
    retriever = make("bm25", **settings)
    retriever.add(documents)
    numbers = {name: settings[name] for name in ("k1", "b") if name in settings}
    expected = [slow_bm25(documents, query, retriever.analyzer, **numbers) for query in QUERIES]
    for found, of_query in zip(hits(retriever, top_k=60), expected, strict=True):
        scores = dict(of_query)
        assert {id for id, _ in found} == scores.keys()
        for id, score in found:
            assert score == pytest.approx(scores[id], rel=1e-12)


@pytest.mark.parametrize("settings", [{"k1": -1}, {"b": 1.5}, {"language": "klingon"}])
def test_bad_bm25_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings)) if "language" not in settings else "klingon"):
        make("bm25", **settings)


def test_bm25_equals_bm25s():
    bm25s = pytest.importorskip("bm25s")
    documents = random_documents(200)
    retriever = make("bm25")
    retriever.add(documents)
    terms = retriever.analyzer.terms
    oracle = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    oracle.index([terms(f"{document.title}\n{document.content}") for document in documents], show_progress=False)
    for query in ("baun", "beun caun", "cyun feun giun houn", "diun diun fuun"):
        expected = oracle.get_scores(terms(query))
        found = retriever.score(query, [document.id for document in documents])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        best = retriever.search([query], 10)[0]
        np.testing.assert_allclose([d.score for d in best], np.sort(expected)[::-1][: len(best)], rtol=1e-5)


def test_bm25_orders_single_words_as_rank_bm25():
    """Its idf differs (and can be negative), its term weight is ours times k1 + 1: one word's ranking must agree."""
    rank_bm25 = pytest.importorskip("rank_bm25")
    documents = random_documents(200)
    retriever = make("bm25")
    retriever.add(documents)
    terms = retriever.analyzer.terms
    oracle = rank_bm25.BM25Okapi([terms(f"{d.title}\n{d.content}") for d in documents], k1=1.5, b=0.75)
    ids = [document.id for document in documents]
    for query in ("cyun", "diun", "feun"):
        expected, found = oracle.get_scores(terms(query)), np.array(retriever.score(query, ids))
        assert (found > 0).sum() == (expected > 0).sum() > 3
        ratio = found[found > 0] / expected[found > 0]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


@pytest.mark.parametrize("sublinear", [True, False])
def test_simple_equals_scikit_learn(sublinear):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    documents = random_documents(200)
    retriever = make("simple", sublinear=sublinear)
    retriever.add(documents)
    vectorizer = text.TfidfVectorizer(analyzer=retriever.analyzer.terms, sublinear_tf=sublinear)
    matrix = vectorizer.fit_transform([f"{document.title}\n{document.content}" for document in documents])
    for query in ("baun", "beun caun", "baun baun cyun dyun", "feun giun houn"):
        expected = (matrix @ vectorizer.transform([query]).T).toarray()[:, 0]
        found = retriever.score(query, [document.id for document in documents])
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
