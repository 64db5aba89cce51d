"""Promises of tasks/refrag.py: what a multi-hop conversation holds, where searches come from, how answers score."""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from nanochat.conversation import render, validate
from nanochat.engine import Generation
from nanochat.metrics import ABSTENTION
from nanochat.retrieval import Document, RetrievalManager
from nanochat.rl.rewards import Rewards
from nanochat.searching import Hop
from tasks.example_world import generate_world
from tasks.refrag import MultiHopRAGTask, StaticRAGTask, expand, hops_of, model_hops, multi_hop_figures

WORLD = generate_world(150, seed=2)
QUERIES = [*WORLD.multihop["train"][:40], *WORLD.questions["train"][:10]]


@pytest.fixture(scope="module")
def manager() -> RetrievalManager:
    return RetrievalManager("bm25", documents=WORLD.documents)


def parts_of(conversation):
    user, assistant = conversation["messages"]
    assert user["role"] == "user" and assistant["role"] == "assistant"
    return assistant["content"]


def test_each_hop_is_a_search_and_what_it_found_with_the_gold_document_in_any_place(manager):
    task = MultiHopRAGTask(QUERIES, manager, top_k_per_hop=3)
    places = set()
    for i, query in enumerate(task.queries):
        conversation = task.conversation(i)
        validate(conversation)
        *hops, answer = parts_of(conversation)
        assert [part["query"] for part in hops[::2]] == [hop["query"] for hop in hops_of(query)]
        shown = []
        for part, hop in zip(hops[1::2], hops_of(query), strict=True):
            ids = [document["id"] for document in part["documents"]]
            assert len(ids) == 3 and set(hop["doc_ids"]) <= {*ids, *shown} and not set(ids) & set(shown)
            places.add(ids.index(hop["doc_ids"][0]) if hop["doc_ids"][0] in ids else None)
            shown += ids
        number = int(answer["text"].split("]")[0][1:])
        assert shown[number - 1] == hops_of(query)[-1]["doc_ids"][0]  # the document that the answer stands in
        assert answer["text"].endswith(f"] {query['answers'][0]}")
        assert query["answers"][0] in manager.documents([shown[number - 1]])[0].content
        assert task.conversation(i) == conversation
    assert {0, 1, 2} <= places
    assert any(task.conversation(i, epoch=1) != task.conversation(i) for i in range(5))
    plain = MultiHopRAGTask(QUERIES, manager, 2, cite=False)
    assert parts_of(plain[0])[-1]["text"] == QUERIES[0]["answers"][0]


def test_nothing_is_learned_from_documents(manager, small_tokenizer):
    task = MultiHopRAGTask(QUERIES, manager, 2)
    rendered = render(task[0], small_tokenizer)
    inside = set()
    for start, end in rendered.document_spans:
        inside.update(range(start, end))
    learned = {at for at, mask in enumerate(rendered.mask) if mask}
    assert len(rendered.document_spans) == 4 and not inside & learned
    ids = [rendered.ids[at] for at in sorted(learned)]
    written = small_tokenizer.decode(ids)
    for hop in hops_of(QUERIES[0]):
        assert f"<|search_start|> {hop['query']}<|search_end|>" in written
    assert written.endswith(f"{QUERIES[0]['answers'][0]}<|assistant_end|>")


def test_a_rule_adds_the_names_that_the_best_document_has():
    documents = [
        Document("a", "Blue Harbour", "Blue Harbour is a film by Anna Tovik and Karl van Dene."),
        Document("b", "Other", "Mentions Nobody."),
    ]
    made = expand("Who directed Blue Harbour?", documents)
    assert made.startswith("Who directed Blue Harbour? ") and "Tovik" in made and "Karl" in made
    assert "Nobody" not in made and made.count("Harbour") == 1
    assert expand("Why?", []) == "Why?"


def test_searches_by_rule(manager):
    task = MultiHopRAGTask(QUERIES, manager, 2, query_source="expander")
    for query, hops in zip(task.queries, task.hops, strict=True):
        assert hops[0]["query"] == query["query"] and len(hops) == len(hops_of(query))
        assert all(hop["query"].startswith(query["query"]) for hop in hops)
        assert [hop["doc_ids"] for hop in hops] == [hop["doc_ids"] for hop in hops_of(query)]
    with pytest.raises(UserError, match="gold or expander"):
        MultiHopRAGTask(QUERIES, manager, query_source="model")


class Answers:
    """An engine that gives what it was given."""

    def __init__(self, infos):
        self.infos = infos

    def generate_from_conversations(self, conversations, batch_size, searching, max_tokens):
        return [("x", info) for info in self.infos]


def test_a_models_searches_are_taken_where_they_found_the_gold_documents(manager):
    query = QUERIES[0]
    gold = manager.documents([hop["doc_ids"][0] for hop in query["hops"]])
    right = Generation(hops=[Hop(f"mine {n}", 0, documents=[document]) for n, document in enumerate(gold)])
    swapped = Generation(hops=[Hop("x", 0, documents=[document]) for document in reversed(gold)])
    made = model_hops(Answers([right, swapped, Generation()]), [query] * 3, None)
    assert [hop["query"] for hop in made[0]["hops"]] == ["mine 0", "mine 1"]
    assert [hop["doc_ids"] for hop in made[0]["hops"]] == [hop["doc_ids"] for hop in query["hops"]]
    assert made[1]["hops"] == made[2]["hops"] == query["hops"]


def test_static_conversations_are_themselves():
    task = StaticRAGTask([{"messages": [1]}, {"messages": [2]}])
    assert len(task) == 2 and task[1] == task.conversation(1, epoch=5) == {"messages": [2]}


def test_bad_queries(manager):
    with pytest.raises(UserError, match="nobody"):
        MultiHopRAGTask([{**QUERIES[0], "hops": [{"query": "x", "doc_ids": ["nobody"]}]}], manager)
    with pytest.raises(UserError, match="nothing to train on"):
        MultiHopRAGTask([{**QUERIES[0], "answers": []}], manager)
    with pytest.raises(UserError, match="nothing to train on"):
        MultiHopRAGTask(WORLD.unanswerable["train"], manager)


def test_without_an_answer_it_is_taught_to_abstain(manager):
    query = WORLD.unanswerable["train"][0]
    task = MultiHopRAGTask([QUERIES[0], query], manager, 2)
    search, found, answer = parts_of(task[1])
    assert search["query"] == query["hops"][0]["query"] and answer["text"] == ABSTENTION
    assert len(found["documents"]) == 2  # those that search finds for it, none of them right


# --- scores and rewards


def generation(documents, reason="stop", query="q"):
    return Generation(finish_reason=reason, hops=[Hop(query, 0, documents=documents)] if documents else [])


A, B, C = (Document(id, "", "x") for id in "abc")
QUERY = {"query": "?", "answers": ["Old Town"], "doc_ids": ["a", "b"]}


def test_figures():
    answers = [("[2] old town", generation([A, B])), ("town", generation([A, C])), ("", generation([], "length"))]
    figures = multi_hop_figures([QUERY] * 3, answers)
    assert figures["em"] == pytest.approx(1 / 3) and figures["f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert figures["evidence"] == pytest.approx(0.5) and figures["searches"] == pytest.approx(2 / 3)
    assert figures["documents"] == pytest.approx(4 / 3) and figures["answered"] == pytest.approx(2 / 3)


def test_figures_of_abstaining():
    nobody = {"query": "?", "answers": [], "doc_ids": []}
    answers = [(ABSTENTION, generation([A, B])), (ABSTENTION, generation([C])), ("[1] old town", generation([C]))]
    figures = multi_hop_figures([QUERY, nobody, nobody], answers)
    assert figures["em"] == pytest.approx(1 / 3) and figures["evidence"] == 1  # of the one with gold documents
    assert figures["abstention_precision"] == figures["abstention_recall"] == 0.5 and figures["false_refusal"] == 1
    rewards = Rewards(most_documents=4)
    assert rewards(nobody, ABSTENTION, generation([A]))["reward"] == pytest.approx(0.6 + 0.3 + 0.1 * 0.75)
    assert rewards(nobody, "old town", generation([A]))["reward"] == 0
    assert rewards(QUERY, ABSTENTION, generation([A, B]))["reward"] == pytest.approx(0.3)


def test_rewards():
    rewards = Rewards(most_documents=4)
    best = rewards(QUERY, "[1] Old Town", generation([A, B]))
    assert best["reward"] == pytest.approx(0.6 + 0.3 + 0.1 * 0.5)
    half = rewards(QUERY, "town", generation([A, C]))
    assert half["reward"] == pytest.approx(0.6 * 2 / 3 + 0.3 / 2 + 0.1 * (2 / 3) * 0.5)
    assert Rewards(metric="em")(QUERY, "town", generation([A, C]))["answer"] == 0
    # neither silence nor searching without an end pays
    assert rewards(QUERY, "", generation([A, B]))["reward"] == pytest.approx(0.3 - 0.5)
    assert rewards(QUERY, "old town", generation([A, B], "length"))["reward"] == pytest.approx(0.3 - 0.5)
    assert rewards(QUERY, "old town", generation([A], query=""))["valid"] == 0
    assert rewards(QUERY, "no", generation([]))["reward"] == 0
    priced = Rewards(price=0.2, most_documents=4)(QUERY, "Old Town", generation([A, B]))
    assert priced["reward"] == pytest.approx(best["reward"] - 0.2)
    unknown = Rewards(most_documents=4)({**QUERY, "doc_ids": []}, "Old Town", generation([]))
    assert unknown["reward"] == pytest.approx(1.0)  # without gold documents being right is all
    with pytest.raises(UserError, match="f1 or em"):
        Rewards(metric="contains")
