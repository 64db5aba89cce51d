"""One contract for all retrievers."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.filters import parse_filters
from tests.nanochat.retrieval.samples import QUERIES, hits, make, random_documents, same


def test_best_first_ties_by_id(any_kind):
    retriever = make(any_kind)
    documents = random_documents(200)
    twins = [Document(f"t{index:02d}", "", "beun caun") for index in range(40)]
    retriever.add([*documents[:100], *reversed(twins), *documents[100:]])
    found = hits(retriever, top_k=25)
    for of_query in found:
        assert of_query == sorted(of_query, key=lambda hit: (-hit[1], hit[0]))
    exact = [id for id, _ in found[1] if id.startswith("t")]
    assert exact == [f"t{index:02d}" for index in range(len(exact))] and len(exact) >= 15


def test_top_k_is_the_beginning_of_a_longer_list(any_kind):
    retriever = make(any_kind, candidates=200) if "hybrid" in any_kind else make(any_kind)
    retriever.add(random_documents(200))
    longest = hits(retriever, top_k=200)
    for top_k in (1, 3, 50):
        assert hits(retriever, top_k=top_k) == [found[:top_k] for found in longest]


def test_one_query_alone_equals_the_batch(any_kind):
    retriever = make(any_kind)
    retriever.add(random_documents(150))
    assert [hits(retriever, [query])[0] for query in QUERIES] == hits(retriever)


def test_score_gives_what_search_gave(any_kind):
    retriever = make(any_kind)
    retriever.add(random_documents(30))
    for query in QUERIES[:2]:
        found = retriever.search([query], 30)[0]  # all of them, as a hybrid's scores depend on who the candidates are
        scores = retriever.score(query, [document.id for document in found])
        np.testing.assert_allclose(scores, [document.score for document in found], rtol=1e-12, atol=1e-15)


def test_k_is_clamped_and_checked(any_kind):
    retriever = make(any_kind)
    retriever.add(random_documents(3))
    assert len(retriever.search(["baun beun caun"], 1000)[0]) <= 3
    for top_k in (0, -1):
        with pytest.raises(UserError, match="top_k"):
            retriever.search(["baun"], top_k)
    with pytest.raises(TypeError, match="list"):
        retriever.search("baun")


def test_empty_base_and_empty_queries(any_kind):
    retriever = make(any_kind)
    assert retriever.search(["anything", ""], 5) == [[], []]
    assert retriever.search([], 5) == []
    retriever.add([])
    assert len(retriever) == 0 and retriever.search(["anything"], 5) == [[]]
    retriever.add([Document("a", "", "baun")])
    assert retriever.search(["", " \n"], 5) == [[], []]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_base(any_kind, count):
    retriever = make(any_kind)
    retriever.add([Document(f"{index}", "", f"common word{index}") for index in range(count)])
    for index in range(count):
        first = retriever.search([f"word{index}"], 5)[0][0]
        assert first.id == f"{index}" and first.score > 0
    assert retriever.search(["common"], 5)[0][0].score > 0


def test_documents_come_back_whole(any_kind):
    document = Document("id-1", "A title", 'Text with "quotes",\nlines and 日本語', "source.txt", {"year": 2024})
    retriever = make(any_kind)
    retriever.add([document, Document("id-2", "", "something else")])
    found = retriever.search(["title quotes"], 1)[0][0]
    assert found.score > 0
    found.score = 0.0
    assert found == document


@pytest.mark.parametrize(
    ("query", "best"), [("CAFE", "1"), ("café", "1"), ("Привет", "2"), ("東京", "3"), ("京都", "4"), ("naïve ﬁnd", "5")]
)
@pytest.mark.parametrize("kind", ["simple", "bm25"])
def test_unicode(kind, query, best):
    texts = ["the café", "привет мир", "東京は大きい", "京都は古い", "NAIVE finding", "nothing \U0001f600"]
    retriever = make(kind)
    retriever.add([Document(str(index), "", text) for index, text in enumerate(texts, 1)])
    assert retriever.search([query], 1)[0][0].id == best


def test_long_query(any_kind):
    retriever = make(any_kind)
    retriever.add(random_documents(20))
    assert retriever.search(["baun beun " * 1000], 3)[0]


def test_adds_and_deletes_equal_a_fresh_build(any_kind):
    documents = random_documents(120)
    changed = [Document(document.id, "new", "cyun feun feun") for document in documents[10:20]]
    more = random_documents(40, seed=1, words=30, prefix="a")
    retriever = make(any_kind)
    retriever.add(documents[:70])
    retriever.add(documents[70:])
    retriever.delete([document.id for document in documents[30:60]])
    retriever.add([*changed, *more])  # ids that are there are replaced
    retriever.delete([more[0].id])
    kept = [*documents[:10], *documents[20:30], *documents[60:], *changed, *more[1:]]
    fresh = make(any_kind)
    fresh.add(kept)
    assert len(retriever) == len(kept)
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))
    retriever.delete([document.id for document in kept])
    assert len(retriever) == 0 and retriever.search(["baun"], 5) == [[]]
    retriever.add(kept)
    same(hits(retriever, top_k=30), hits(fresh, top_k=30))


def test_bad_changes_change_nothing(any_kind):
    retriever = make(any_kind)
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
def test_filters_leak_nothing_and_cost_nothing(any_kind, where, passes):
    documents = tagged()
    retriever = make(any_kind)
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
        assert [document.id for document in few] == [document.id for document in found[:3]] or "hybrid" in any_kind
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


def test_unknown_types_and_settings_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'bm25'"):
        create_retriever("bm52")
    with pytest.raises(UserError, match="did you mean 'language'"):
        create_retriever("bm25", langauge="english")
    with pytest.raises(UserError, match="has no setting 'alpha'"):
        create_retriever("simple", alpha=0.5)
