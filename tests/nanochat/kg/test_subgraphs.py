"""Subgraphs and batches of them against what the graph and the miner say of each question."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.kg.coverage import Grounded, ground
from nanochat.kg.linking import Linker
from nanochat.kg.mining import Miner, neighbourhood
from nanochat.kg.questions import Question
from nanochat.kg.subgraphs import LAST, PATH, TOPIC, batches, find_subgraphs, make_batch, question_text


def test_names_of_topics_are_not_read(films):
    linker = Linker(films.graph)

    def read(text: str, topics: tuple[str, ...] = ()) -> str:
        return question_text(ground(Question("1", text, [], list(topics)), linker), linker)

    assert read("who directed [Film 3x]?") == f"who directed {TOPIC}?"
    assert read("Film 3x or film 4X?") == f"{TOPIC} or {TOPIC}?"
    assert read("who played in film 3x with Actor 5x", ("Film 3x",)) == f"who played in {TOPIC} with Actor 5x"
    assert read("nothing of it") == "nothing of it"
    assert read("nothing of it", ("Film 3x",)) == "nothing of it"


def test_subgraphs_say_what_the_graph_says(films):
    graph, subgraphs, miner = films.graph, films.subgraphs, Miner(films.graph)
    for question, one in list(enumerate(films.grounded))[::17]:
        own = slice(*subgraphs.fact_starts[question : question + 2])
        nodes = subgraphs.nodes[slice(*subgraphs.node_starts[question : question + 2])]
        is_topic, is_answer = (
            each[slice(*subgraphs.node_starts[question : question + 2])]
            for each in (subgraphs.is_topic, subgraphs.is_answer)
        )
        facts = subgraphs.facts[own]
        assert facts.tolist() == neighbourhood(graph, one.topics).facts.tolist()
        assert (nodes[subgraphs.heads[own]] == graph.heads[facts]).all()
        assert (nodes[subgraphs.tails[own]] == graph.tails[facts]).all()
        assert set(nodes[is_topic]) == set(one.topics)
        assert set(nodes[is_answer]) == set(one.answers) & set(nodes)
        mined = set(miner.mine(one.topics, one.answers).facts)
        for fact, label in zip(facts, subgraphs.labels[own], strict=True):
            ends = {int(graph.heads[fact]), int(graph.tails[fact])}
            wanted = (LAST if ends & set(one.answers) else PATH) if fact in mined else 0
            assert label == wanted
        assert subgraphs.path_facts[question] == len(mined)
        assert subgraphs.answers[question] == len(one.answers)
    # an answer of three facts is the end of the last, and of the others not
    three = films.hops.index(3)
    labels = subgraphs.labels[slice(*subgraphs.fact_starts[three : three + 2])]
    assert {PATH, LAST} <= set(labels)


def test_a_batch_is_its_questions_side_by_side(films):
    graph = films.graph
    chosen = [40, 3, 3, 100]
    batch = make_batch(graph, films.subgraphs, chosen)
    assert batch.texts == [films.subgraphs.texts[question] for question in chosen]
    for at, question in enumerate(chosen):
        facts = batch.facts[slice(*batch.fact_starts[at : at + 2])]
        assert facts.tolist() == neighbourhood(graph, films.grounded[question].topics).facts.tolist()
    assert (batch.nodes[batch.heads] == graph.heads[batch.facts]).all()
    assert (batch.nodes[batch.tails] == graph.tails[batch.facts]).all()
    assert (batch.relations.numpy() == graph.relations[batch.facts]).all()
    for ends in (batch.heads, batch.tails):
        assert (batch.graph_of_node[ends] == batch.graph_of_fact).all()
    R = len(graph.relation_names)
    walked = [
        *zip(batch.heads.tolist(), batch.tails.tolist(), batch.relations.tolist(), strict=True),
        *zip(batch.tails.tolist(), batch.heads.tolist(), (batch.relations + R).tolist(), strict=True),
    ]
    edges = list(zip(batch.edge_from.tolist(), batch.edge_to.tolist(), batch.edge_relation.tolist(), strict=True))
    assert sorted(edges) == sorted(walked)
    for node in range(len(batch.nodes)):
        assert (batch.edge_to[batch.edge_starts[node] : batch.edge_starts[node + 1]] == node).all()
    assert batch.edge_starts[-1] == len(edges)


def test_questions_without_topics_and_cut_subgraphs(films):
    nowhere = Grounded(Question("1", "what?", ["Film 3x"]), [], [0], [], [])
    subgraphs = find_subgraphs(films.graph, ["a", "b"], [nowhere, films.grounded[0]], max_facts=3)
    assert np.diff(subgraphs.fact_starts).tolist() == [0, 3]
    assert subgraphs.complete.tolist() == [True, False]
    batch = make_batch(films.graph, subgraphs, [0, 1, 0])
    assert batch.fact_starts.tolist() == [0, 0, 3, 3]
    with pytest.raises(UserError, match="at most 16,000"):
        find_subgraphs(films.graph, [], [], max_facts=20_000)


def test_batches_have_all_questions_and_not_too_many_facts(films):
    sizes = np.diff(films.subgraphs.fact_starts)
    order = np.random.default_rng(0).permutation(len(sizes))
    found = batches(order, films.subgraphs, max_facts=400, max_questions=5)
    assert [question for batch in found for question in batch] == order.tolist()
    assert all(len(batch) <= 5 and (sizes[batch].sum() <= 400 or len(batch) == 1) for batch in found)
    assert max(map(len, found)) > 1
