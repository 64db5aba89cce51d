"""The contract of retrievers (tests/nanochat/retrieval/test_retrievers.py) for one whose documents are facts, with a
fact retriever and by the rule."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.kg.coverage import ground
from nanochat.kg.documents import as_facts, fact_document, fact_documents, fact_id, fact_of, fact_text
from nanochat.kg.gnn import FactRetriever, RetrieverConfig
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.mining import neighbourhood
from nanochat.kg.question_encoder import build_vocabulary
from nanochat.kg.questions import Question
from nanochat.kg.retriever import KGRetriever
from nanochat.kg.subgraphs import find_subgraphs, make_batch, question_text
from nanochat.kg.triples import read_facts
from nanochat.retrieval import Document, RetrievalManager, collection
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.knowledge_base import (
    add_documents,
    build_knowledge_base,
    delete_documents,
    open_knowledge_base,
    rollback,
)
from nanochat.retrieval.serve import Server
from tests.nanochat.retrieval.samples import hits, same

RELATIONS = ["directed_by", "starred_actors", "has_genre", "written_by"]
QUERIES = [
    "who directed [film 3]?",
    "which genre have the films that person 2 has written",
    "film 1 and person 4",
    "nothing that is there",
    "",
]


def random_facts(count: int = 120, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    triples = {
        (f"film {rng.randrange(25)}", rng.choice(RELATIONS), f"person {rng.randrange(15)}") for _ in range(count)
    }
    return [fact_document(triple) for triple in rng.sample(sorted(triples), len(triples))]


def some_fact_retriever(seed: int = 0) -> FactRetriever:
    torch.manual_seed(seed)
    return FactRetriever(RetrieverConfig(width=16), build_vocabulary([*RELATIONS, *QUERIES]))


@pytest.fixture(params=["rule", "trained"])
def make(request):
    def make(**settings) -> KGRetriever:
        if request.param == "trained":
            settings = {"fact_retriever": some_fact_retriever(), "threshold": 0.0, **settings}
        return create_retriever("kg", **settings)

    return make


def search(retriever, top_k=10):
    return hits(retriever, QUERIES, top_k)


# --- facts as documents


def test_a_fact_as_a_document():
    document = fact_document(("Titanic", "directed_by", "James Cameron"))
    assert (document.title, document.content) == ("Titanic", "Titanic directed by James Cameron.")
    assert fact_of(document) == ("Titanic", "directed_by", "James Cameron")
    assert fact_text(("a", "people.person.born_in", "b")) == "a born in b."
    assert fact_text(("a", "http://x.org/born_in/", "b")) == "a born in b."
    assert fact_id(("a|b", "c", "d")) != fact_id(("a", "b|c", "d"))
    (read,) = as_facts([Document("mine", "", " Titanic|directed_by|James Cameron\n", "a.txt", {"year": 1997})])
    assert read == Document("mine", "Titanic", document.content, "a.txt", {"year": 1997, **document.metadata})


@pytest.mark.parametrize(
    "document",
    [
        Document("x", "", "a|b"),
        Document("x", "", "a||c"),
        Document("x", "", "a|b|c\nd"),
        Document("x", "", "a|b|c", metadata={"head": "a", "relation": "b"}),
        Document("x", "", "text", metadata={"head": "a", "relation": "b", "tail": 3}),
    ],
)
def test_what_states_no_fact_is_refused_and_nothing_changes(make, document):
    retriever = make()
    retriever.add(random_facts())
    before = search(retriever)
    with pytest.raises(UserError, match="'x' states no fact"):
        retriever.add([*random_facts(seed=1), document])
    with pytest.raises(UserError, match="'nobody'"):
        retriever.delete([random_facts()[0].id, "nobody"])
    assert search(retriever) == before


# --- what is found


def test_by_fact_retriever_equals_one_forward_for_each_question():
    facts, trained = random_facts(), some_fact_retriever()
    retriever = KGRetriever(trained, threshold=0.0)
    retriever.add(facts)
    index = retriever.index(retriever.documents)
    graph, linker = index.graph, index.linker
    for query, found in zip(QUERIES[:3], retriever.search(QUERIES[:3], 1000), strict=True):
        grounded = ground(Question("", query, []), linker)
        text = question_text(grounded, linker)
        with torch.no_grad():
            logits = trained(make_batch(graph, find_subgraphs(graph, [text], [grounded]), [0])).facts
        around = neighbourhood(graph, grounded.topics).facts.tolist()
        expected = dict(zip(map(graph.text, around), logits.sigmoid().tolist(), strict=True))
        assert {"|".join(fact_of(document)): document.score for document in found} == pytest.approx(expected, abs=1e-3)
    few = KGRetriever(trained, threshold=found[5].score)
    few.add(facts)
    assert hits(few, QUERIES[:3], 1000)[2] == hits(retriever, QUERIES[:3], 1000)[2][: len(hits(few, QUERIES)[2])]
    assert min(document.score for document in few.search(QUERIES[2:3], 1000)[0]) >= found[5].score


def test_the_rule_prefers_the_relation_that_is_asked_for_and_few_facts_to_many(capfd):
    lines = ["Titanic|directed_by|James Cameron", "Titanic|has_genre|Drama", "Titanic|has_tags|ship"]
    lines += [f"Film {number}|has_genre|Drama" for number in range(9)]
    retriever = create_retriever("kg")
    retriever.add(Document(line, "", line) for line in lines)
    found = retriever.search(["who directed Titanic?", "what is [Titanic]", "is titanic a drama"], 3)
    assert [[document.id for document in of_query] for of_query in found] == [
        [lines[0], lines[2], lines[1]],  # Drama has ten facts
        [lines[0], lines[2], lines[1]],
        [lines[1], lines[0], lines[2]],  # both ends are named
    ]
    # of its terms (direct) the relation has one, one end is named, and Titanic has three facts
    assert found[0][0].score == pytest.approx((1 + 0 + 1 / 4) / (1 + 2))
    assert (
        capfd.readouterr().err
        == "no trained fact retriever: facts are ranked by the words they share with the question\n"
    )
    retriever.search(["who directed Titanic?"])
    assert not capfd.readouterr().err


def test_no_entity_no_documents(make):
    retriever = make()
    retriever.add(random_facts())
    assert retriever.search(["who is who", "", "film", "[nobody] directed film 3"], 5) == [[], [], [], []]


def test_best_first_ties_by_id(make):
    retriever = make()
    retriever.add(random_facts())
    found = search(retriever, 1000)
    assert sum(map(len, found)) > 15
    for of_query in found:
        assert of_query == sorted(of_query, key=lambda hit: (-hit[1], hit[0]))
    twins = [fact_document(("hub", "starred_actors", f"actor {number}")) for number in range(20)]
    retriever.add(twins)  # nothing tells one from another
    tied = hits(retriever, ["who played in [hub]"], 1000)[0]
    assert len({score for _, score in tied}) == 1 and [id for id, _ in tied] == sorted(twin.id for twin in twins)


def test_the_last_bits_of_a_logit_decide_nothing():
    class Noisy(FactRetriever):
        def forward(self, batch):
            scored = super().forward(batch)
            scored.facts += 1e-5 * torch.rand_like(scored.facts)
            return scored

    retriever = KGRetriever(Noisy(RetrieverConfig(width=16), RELATIONS), threshold=0.0)
    twins = [fact_document(("hub", "starred_actors", f"actor {number}")) for number in range(20)]
    retriever.add(twins)
    assert [document.id for document in retriever.search(["[hub]"], 20)[0]] == sorted(twin.id for twin in twins)


def test_top_k_is_the_beginning_of_a_longer_list_and_checked(make):
    retriever = make()
    retriever.add(random_facts())
    longest = search(retriever, 1000)
    for top_k in (1, 3, 50):
        assert search(retriever, top_k) == [found[:top_k] for found in longest]
    with pytest.raises(UserError, match="top_k"):
        retriever.search(["film 1"], 0)
    with pytest.raises(TypeError, match="list"):
        retriever.search("film 1")


@pytest.mark.parametrize(("queries", "facts"), [(2, 65_536), (256, 65_536), (256, 50)])
def test_one_query_alone_equals_the_batch(make, monkeypatch, queries, facts):
    monkeypatch.setattr("nanochat.kg.retriever.QUERIES", queries)
    monkeypatch.setattr("nanochat.kg.retriever.BATCH_FACTS", facts)
    retriever = make()
    retriever.add(random_facts())
    mixed = [*reversed(QUERIES), *QUERIES]  # those that name nothing stand among the others
    same([hits(retriever, [query])[0] for query in mixed], hits(retriever, mixed))


def test_score_gives_what_search_gave_and_nothing_elsewhere(make):
    retriever = make(max_hops=1)
    retriever.add([*random_facts(), fact_document(("far", "has_genre", "away"))])
    (found,) = retriever.search(QUERIES[:1], 1000)
    ids = [document.id for document in found]
    scores = retriever.score(QUERIES[0], [*ids, fact_id(("far", "has_genre", "away"))])
    assert scores == [*(document.score for document in found), 0.0] and len(ids) > 2


def test_documents_come_back_whole(make):
    document = Document("id-1", "A title", "Some text about it.", "a.txt", fact_document(("a b", "r", "c d")).metadata)
    retriever = make()
    retriever.add([document])
    (found,) = retriever.search(["what of a b?"], 1)[0]
    assert found.score > 0 and retriever.get(["id-1", "no"]) == [document, None]
    found.score = 0.0
    assert found == document


def test_every_document_that_states_a_fact_is_found(make):
    retriever = make()
    retriever.add([Document(id, "", "alpha|made|beta", metadata={"from": id}) for id in ("y", "x")])
    assert [document.id for document in retriever.search(["alpha"], 5)[0]] == ["x", "y"]
    assert retriever.index(retriever.documents).graph.num_facts == 1
    assert [document.id for document in retriever.search(["alpha"], 5, {"from": "y"})[0]] == ["y"]
    retriever.delete(["x"])
    assert [document.id for document in retriever.search(["alpha"], 5)[0]] == ["y"]


def test_filters_leak_nothing_and_cost_nothing(make):
    retriever = make()
    facts = random_facts()
    retriever.add(facts[:40])
    retriever.add(facts[40:])
    gone = {document.id for document in facts[::4]}
    retriever.delete(gone)
    for where in ({"relation": "directed_by"}, {"relation": ["has_genre", "written_by"], "tail": "person 2"}):
        wanted = {d.id for d in facts if d.metadata["relation"] in where["relation"] and d.id not in gone}
        wanted &= {d.id for d in facts if d.metadata["tail"] == where.get("tail", d.metadata["tail"])}
        everything = retriever.search(QUERIES[:3], 1000)
        found = retriever.search(QUERIES[:3], 1000, where)
        assert [[d.id for d in of] for of in found] == [[d.id for d in of if d.id in wanted] for of in everything]
        assert any(found)


# --- changes


def test_adds_and_deletes_equal_a_fresh_build(make):
    facts, more = random_facts(), random_facts(60, seed=1)
    known = {document.id for document in facts}
    new = [document for document in more if document.id not in known]
    retriever, fresh = make(), make()
    retriever.add(facts[:50])
    retriever.add(facts[50:])
    retriever.delete([document.id for document in facts[20:40]])
    retriever.add([*new, *facts[:5]])  # those are there and are replaced
    retriever.delete([new[0].id])
    kept = [*facts[:20], *facts[40:], *new[1:]]
    fresh.add(kept)
    assert len(retriever) == len(kept)
    same(search(retriever, 1000), search(fresh, 1000))
    retriever.delete([document.id for document in kept])
    assert len(retriever) == 0 and retriever.search(["film 1"], 5) == [[]]
    retriever.add(kept)
    same(search(retriever, 1000), search(fresh, 1000))


def test_what_max_facts_cuts_off_does_not_depend_on_the_order_of_adding(make):
    facts = random_facts()
    one, other = make(max_facts=9), make(max_facts=9)
    one.add(facts)
    other.add(reversed(facts))
    same(search(one, 1000), search(other, 1000))


@pytest.mark.parametrize("count", [0, 1, 80])
def test_saved_and_loaded_equals_itself(make, count, tmp_path):
    retriever = make()
    retriever.add(random_facts(count))
    retriever.save(tmp_path / "kb")
    loaded = create_retriever("kg", threshold=retriever.threshold).load(tmp_path / "kb")
    assert len(loaded) == len(retriever) and loaded.settings() == retriever.settings()
    assert search(loaded) == search(retriever)
    extra = random_facts(10, seed=3)
    for one in (loaded, retriever):
        one.add(extra)
        one.delete([extra[0].id])
    same(search(loaded), search(retriever))


def test_another_fact_retriever_is_another_identity():
    hashes = {KGRetriever(some_fact_retriever(seed)).settings()["fact_retriever_hash"] for seed in (0, 0, 1)}
    assert len(hashes) == 2 and "fact_retriever_hash" not in KGRetriever().settings()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_hops": 0}, "max_hops is 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"fact_retriever": "nowhere"}, "nowhere has no retriever"),
        ({"fact_retreiver": "x"}, "did you mean 'fact_retriever'"),
    ],
)
def test_bad_settings_are_one_line(settings, reason):
    with pytest.raises(UserError, match=reason):
        create_retriever("kg", **settings)


# --- as a knowledge base


def test_a_base_lives_through_changes_in_any_order(tmp_path, monkeypatch):
    """What is read again equals a retriever made afresh, whatever segments were merged on the way."""
    monkeypatch.setattr(collection, "TIER", 3)
    rng, pool, trained = random.Random(0), random_facts(), some_fact_retriever()
    path, there, before = tmp_path / "kb", {document.id: document for document in pool[:10]}, {}
    build_knowledge_base(there.values(), path, "kg", fact_retriever=trained, threshold=0.0)
    manager = RetrievalManager(knowledge_base_path=path)
    for step in range(12):
        kind = rng.choice(["add", "add", "delete", "rollback"]) if step else "add"
        after = dict(there)
        if kind == "add":
            new = rng.sample(pool, rng.randint(1, 20))
            add_documents(path, new)
            after |= {document.id: document for document in new}
        elif kind == "delete":
            gone = rng.sample(sorted(there), min(len(there), 5))
            delete_documents(path, gone)
            after = {id: document for id, document in there.items() if id not in gone}
        else:
            rollback(path)
            after = before
        before, there = there, after
        fresh = KGRetriever(trained, threshold=0.0)
        fresh.add(there.values())
        open_knowledge_base(path, verify=True)
        assert manager.refresh(now=True)
        for read in (manager, RetrievalManager("kg", path)):
            assert len(read) == len(there)
            same(search(read, 1000), search(fresh, 1000))
    files = list((path / manager.version / "fact_retriever").iterdir())
    assert len(files) == 2 and len({file.stat().st_mode for file in files}) == 1  # who may read one may read both
    assert Graph.load(path / manager.version / "graph").num_facts == len(there)


def test_a_new_version_is_read_and_not_made_again_though_its_segments_lie_in_another_order(tmp_path, monkeypatch):
    path, facts = tmp_path / "kb", random_facts()
    build_knowledge_base(facts[:30], path, "kg")
    manager = RetrievalManager(knowledge_base_path=path)
    add_documents(path, facts[30:50])
    changed = open_knowledge_base(path).retriever()
    changed.delete([document.id for document in facts[:12]])
    assert [len(segment) for segment in changed.documents.segments] == [18, 20]  # the first is written anew
    delete_documents(path, [document.id for document in facts[:12]])
    assert [len(segment) for segment in open_knowledge_base(path).documents.segments] == [20, 18]
    fresh = create_retriever("kg")
    fresh.add(facts[12:50])
    expected = search(fresh, 1000)
    monkeypatch.setattr("nanochat.kg.retriever.FactIndex.build", None)
    assert manager.refresh(now=True)
    same(search(manager, 1000), expected)


def test_other_retrievers_search_the_same_base_and_kg_needs_facts(tmp_path):
    build_knowledge_base(random_facts(), tmp_path / "kb", "kg")
    assert RetrievalManager("bm25", tmp_path / "kb").retrieve("directed by person 3", 1)[0].id.startswith("fact:")
    build_knowledge_base(random_facts(), tmp_path / "words", "bm25")
    by_words, by_graph = (RetrievalManager("kg", tmp_path / name) for name in ("words", "kb"))
    assert search(by_words) == search(by_graph)
    build_knowledge_base([Document("plain", "", "Some text.")], tmp_path / "plain", "bm25")
    with pytest.raises(UserError, match="'plain' states no fact"):
        RetrievalManager("kg", tmp_path / "plain").retrieve("text")


def test_over_http(tmp_path):
    path = tmp_path / "kb"
    build_knowledge_base(random_facts(), path, "kg")
    server = Server(RetrievalManager(knowledge_base_path=path), "127.0.0.1", 0, allow_changes=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = create_retriever("client", url=f"http://127.0.0.1:{server.server_port}")
    assert search(client) == search(RetrievalManager(knowledge_base_path=path))
    client.add([Document("mine", "", "new thing|made_by|new person")])
    assert [fact_of(document)[2] for document in client.search(["new thing"], 3)[0]] == ["new person"]
    client.delete(["mine"])
    assert client.search(["new thing"], 3) == [[]]
    server.shutdown()


def test_facts_of_a_file_have_ids_that_stay(tmp_path):
    (tmp_path / "kb.txt").write_text("a|r|b\nc|r|d\na|r|b\n")
    (tmp_path / "other.txt").write_text("x|s|y\nc\tr\td\n".replace("x|s|y\n", ""))
    first = [document.id for document in fact_documents(read_facts([tmp_path / "kb.txt"]))]
    second = [document.id for document in fact_documents(read_facts([tmp_path / "other.txt"]))]
    assert len(set(first)) == 2 and second == first[1:]


def test_linking_is_done_once_for_a_collection(monkeypatch):
    made = []
    monkeypatch.setattr("nanochat.kg.retriever.Linker", lambda graph: made.append(graph) or Linker(graph))
    retriever = create_retriever("kg")
    retriever.add(random_facts())
    for _ in range(3):
        search(retriever)
    assert len(made) == 1
    np.testing.assert_array_equal(retriever.over(retriever.documents).search(QUERIES)[3], [])
    assert len(made) == 1
