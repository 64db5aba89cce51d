"""Milvus for real, embedded: its ranks are those in process, whatever was added, replaced or killed before."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document, RetrievalManager, milvus
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.filters import parse_filters
from nanochat.retrieval.knowledge_base import build_knowledge_base, delete_documents
from tests.nanochat.retrieval.samples import QUERIES, TinyEncoder, hits, make, random_documents

pytest.importorskip("pymilvus")

SEARCHES = ["bm25", "dense", "hybrid"]


def pair(search, **settings):
    """In Milvus and in process."""
    return make(f"milvus {search}", **settings), make(search, **settings)


def live(retriever):
    """A life in which the mean length doubles."""
    documents = random_documents(120)
    retriever.add([Document(d.id, d.title, d.content[:20]) for d in documents[:60]])
    retriever.add(documents[60:])
    retriever.add([Document(d.id, "", d.content * 4) for d in documents[20:50]])
    retriever.delete([d.id for d in documents[50:70]])
    return retriever


@pytest.mark.parametrize(
    ("search", "settings"),
    [
        ("bm25", {}),
        ("bm25", {"variant": "okapi", "k1": 0.0}),
        ("bm25", {"title_weight": 3, "b": 1.0, "stem": False}),
        ("dense", {}),
        ("hybrid", {"alpha": 0.3}),
        ("hybrid", {"fusion": "rrf", "candidates": 7}),
    ],
)
def test_ranks_and_scores_are_those_in_process(search, settings):
    there, here = map(live, pair(search, **settings))
    for top_k in (1, 10, 1000):
        assert hits(there, top_k=top_k) == hits(here, top_k=top_k)
    explained = [
        [d.explanation for d in retriever.search(QUERIES[:3], 5, None, True)[1]] for retriever in (there, here)
    ]
    assert explained[0] == explained[1] and explained[0][0]


def test_terms_that_share_a_number_do_not_matter(monkeypatch):
    monkeypatch.setattr(milvus, "_NUMBERS", 5)
    there, here = map(live, pair("bm25"))
    assert hits(there, top_k=7) == hits(here, top_k=7)


def test_candidates_are_fetched_until_none_can_be_missed(monkeypatch):
    """Short documents pushed first, long ones later: what Milvus ranks 17th may be the best by now."""
    monkeypatch.setattr(milvus, "_SPARE", 1)
    there, here = pair("bm25")
    for retriever in (there, here):
        retriever.add([Document("first", "", "rare")])  # the mean is 1 from now on
        retriever.add([Document(f"d{n:03d}", "", f"rare {'word ' * (n % 50)}" * (1 + n % 3)) for n in range(200)])
    assert hits(there, ["rare", "rare word"], 5) == hits(here, ["rare", "rare word"], 5)


@pytest.mark.parametrize("search", SEARCHES)
def test_opened_again_it_knows_its_settings(search, tmp_path):
    settings = {"encoder": TinyEncoder()} if search != "bm25" else {"b": 0.2}
    uri = tmp_path / "kb.db"
    first = create_retriever("milvus", uri=uri, search=search, **settings)
    assert len(first) == 0 and first.search(["x"]) == [[]] and first.get(["x"]) == [None]
    first.add(random_documents(30))
    again = create_retriever("milvus", uri=uri, **({} if search == "bm25" else settings))
    assert hits(again) == hits(first) and again.settings() == first.settings() and len(again) == 30
    with pytest.raises(UserError, match="title_weight=1"):
        create_retriever("milvus", uri=uri, title_weight=2, **({} if search == "bm25" else settings))
    if search != "bm25":
        other = TinyEncoder()
        other.fingerprint = "another"
        with pytest.raises(UserError, match="another embedding model"):
            create_retriever("milvus", uri=uri, encoder=other)
    stats = again.stats()
    assert stats["documents"] == stats["rows"] == 30 and not stats["half_written"] and stats["search"] == search


def test_a_killed_change_is_counted_again(tmp_path):
    code = f"""
    import os
    from nanochat.retrieval import Document, milvus
    from nanochat.retrieval.create import create_retriever
    milvus.BATCH = 10
    retriever = create_retriever("milvus", uri={str(tmp_path / "kb.db")!r})
    retriever.add(Document(f"a{{n}}", "", f"baun word{{n}}") for n in range(10))
    def documents():
        for n in range(100):
            if n == 25:
                os._exit(9)
            yield Document(f"b{{n}}", "", "baun caun")
    retriever.add(documents())
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 9
    there, here = create_retriever("milvus", uri=tmp_path / "kb.db"), make("bm25")
    assert there.stats()["half_written"]
    assert len(there.search(["word3"])[0]) == 1  # it answers meanwhile
    there.add([Document("last", "", "caun")])
    here.add([Document(f"a{n}", "", f"baun word{n}") for n in range(10)])
    here.add([*(Document(f"b{n}", "", "baun caun") for n in range(20)), Document("last", "", "caun")])
    assert hits(there, ["baun", "caun word3"], 40) == hits(here, ["baun", "caun word3"], 40)
    assert there.stats()["rows"] == len(there) == 31


def test_an_error_of_milvus_is_one_line_and_counted_again(monkeypatch):
    there, here = pair("bm25")
    documents = random_documents(30)
    there.add(documents[:10])
    upsert = there.store.upsert

    def fails(rows):
        upsert(rows)
        raise there.store.pymilvus.MilvusException(message="no room")

    monkeypatch.setattr(there.store, "upsert", fails)
    with pytest.raises(UserError, match="no room"):
        there.add(documents[10:20])
    assert there.stats()["half_written"] and there.stats()["rows"] == 20 and len(there) == 10
    monkeypatch.undo()
    there.add(documents[20:])
    here.add(documents)
    assert hits(there) == hits(here) and len(there) == 30 and not there.stats()["half_written"]


def test_a_refused_document_leaves_the_counts_right():
    there, here = pair("bm25")
    documents = random_documents(5)
    for bad, reason in (
        (Document("long", "", "x" * 70_000), "65,535; cut"),
        (Document("many", "", "x", "", {"n": list(range(5000))}), "4,096"),
        (Document("x" * 2000, "", "x"), "1,024"),
    ):
        with pytest.raises(UserError, match=reason):
            there.add([bad])
    there.add(documents)
    here.add(documents)
    assert hits(there) == hits(here) and len(there) == 5


@pytest.mark.parametrize("name", ["year", "the year", 'a"b', "söurce", "source"])
def test_filters_by_any_name(name):
    documents = [
        Document(f"d{n}", "", "word", "", {name: value})
        for n, value in enumerate([2000, 2001.5, "2001", [1999, 2003], True, [], "é\"'\\\n"])
    ]
    there, here = pair("bm25")
    there.add(documents)
    here.add(documents)
    for wanted in (2000, 2000.0, "2001", True, 1, 2003, "é\"'\\\n", [2000, 2003], [], {"gte": 2000}, {"lt": 2001}):
        assert there.search(["word"], 9, {name: wanted}) == here.search(["word"], 9, {name: wanted}), wanted
    between = parse_filters([f"{name}>2000", f"{name}<2002"])
    assert there.search(["word"], 9, between) == here.search(["word"], 9, between)
    with pytest.raises(UserError, match="gte"):
        there.search(["word"], 9, {name: {"above": 3}})


# --- export


@pytest.fixture
def base(tmp_path):
    encoder = TinyEncoder()
    build_knowledge_base(random_documents(45), tmp_path / "kb", "hybrid", encoder=encoder)
    return delete_documents(tmp_path / "kb", [d.id for d in random_documents(45)[:5]])


@pytest.mark.parametrize("search", SEARCHES)
def test_export_goes_on_where_it_was(base, search, tmp_path, monkeypatch):
    monkeypatch.setattr(milvus, "BATCH", 10)
    target = {"uri": tmp_path / "m.db", "search": search, **encoder(search)}
    from nanochat.retrieval.milvus_export import export_knowledge_base

    class Interrupted(Exception):
        pass

    def interrupt(done):
        if done == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        export_knowledge_base(base, **target, after=interrupt)
    rest = []
    there = export_knowledge_base(base, **target, after=rest.append)
    assert rest == [20, 30, 40] and len(there) == 40  # the batch that was cut short once more
    assert hits(there) == hits(base.retriever(search, **encoder(search)))
    assert export_knowledge_base(base, **target, after=rest.append) and rest == [20, 30, 40]  # nothing to do

    there.store.delete([random_documents(45)[7].id])  # behind our back
    with pytest.raises(UserError, match="39 documents and counts 40"):
        export_knowledge_base(base, **target)
    assert len(export_knowledge_base(base, **target, replace=True).search(["baun"], 100)[0]) > 0

    small = build_knowledge_base(random_documents(3), tmp_path / "small", search, **encoder(search))
    with pytest.raises(UserError, match="something else"):
        export_knowledge_base(small, **target)


def encoder(search):
    return {} if search == "bm25" else {"encoder": TinyEncoder()}


def test_addresses(tmp_path):
    there = create_retriever("milvus", uri=tmp_path / "kb.db", collection="mine")
    there.add([Document("a", "T", "some words", "s", {"n": 1})])
    manager = RetrievalManager(knowledge_base_path=f"milvus:{tmp_path}/kb.db#mine")
    assert manager.retrieve("words")[0].id == "a" and manager.place == f"milvus:{tmp_path}/kb.db#mine"
    assert manager.documents(["a"])[0].metadata == {"n": 1} and manager.unknown(["a", "b"]) == ["b"]
    before = manager.identity()
    there.add([Document("b", "", "more words")])
    assert manager.identity() != before
    for wrong, reason in (
        ({"uri": "data/kb"}, r"\.db"),
        ({"uri": "x.db", "collection": "a-b"}, "letters"),
        ({"uri": "x.db", "dense_index": "PQ"}, "dense_index"),
        ({"uri": tmp_path / "x.db", "search": "simple"}, "bm25, dense or hybrid"),
        ({"uri": tmp_path / "x.db", "bm25_backend": "rank_bm25"}, "bm25_backend"),
    ):
        with pytest.raises(UserError, match=reason):
            create_retriever("milvus", **wrong)
    with pytest.raises(UserError, match="leave 'bm25' out"):
        RetrievalManager("bm25", "http://127.0.0.1:1")
