"""The graph's arrays against lists of facts, and what is walked in them against slow walks."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import networkx
import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.kg.graph import Graph
from nanochat.kg.mining import Miner, neighbourhood
from nanochat.kg.triples import read_facts


@pytest.fixture
def make_graph(tmp_path):
    """A random graph, with a few entities that have many facts."""

    def make(seed: int, entities: int = 40, facts: int = 70) -> Graph:
        rng = random.Random(seed)
        lines = [
            f"é{rng.randrange(entities)}|r{rng.randrange(4)}|é{rng.choice([rng.randrange(entities), rng.randrange(3)])}"
            for _ in range(facts)
        ]
        path = tmp_path / f"{seed}.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return Graph.build(read_facts([path]))

    return make


def test_the_arrays_say_what_the_facts_say(make_graph, tmp_path):
    graph = make_graph(0)
    graph.save(tmp_path / "kg")
    graph.save(tmp_path / "kg")  # in place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "kg"]
    loaded = Graph.load(tmp_path / "kg")
    assert isinstance(loaded.heads, np.memmap)
    for one in (graph, loaded):
        assert len(one) == len({one.name(v) for v in range(len(one))})
        assert all(one.find(one.name(v)) == v for v in range(len(one)))
        assert one.find("é") is one.find("zzz") is one.find("") is None
        walked = defaultdict(list)
        for fact in range(one.num_facts):
            assert one.text(fact).count("|") == 2
            walked[int(one.heads[fact])].append((int(one.tails[fact]), fact))
            walked[int(one.tails[fact])].append((int(one.heads[fact]), ~fact))
        for v in range(len(one)):
            places = one.edges_of(np.array([v]))
            assert sorted(walked[v]) == sorted(
                zip(one.neighbours[places].tolist(), one.edges[places].tolist(), strict=True)
            )
            assert one.degrees[v] == len(walked[v])
        together = one.edges_of(np.array([5, 2]))
        assert together.tolist() == [*one.edges_of(np.array([5])), *one.edges_of(np.array([2]))]


def test_no_graph(tmp_path, make_graph):
    with pytest.raises(UserError, match=r"is no graph: .*graph.json is missing"):
        Graph.load(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is there and is no graph"):
        make_graph(0).save(tmp_path / "other")
    graph = make_graph(0)
    graph.save(tmp_path / "kg")
    (tmp_path / "kg" / "heads.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        Graph.load(tmp_path / "kg")


def slow_paths(graph: Graph, topics: list[int], answer: int, max_hops: int, hub_degree: int):
    """Facts on any shortest path by networkx, and its length; hubs are there only as ends."""
    undirected = networkx.Graph()
    undirected.add_nodes_from(range(len(graph)))
    between = defaultdict(set)
    for fact in range(graph.num_facts):
        ends = frozenset((int(graph.heads[fact]), int(graph.tails[fact])))
        between[ends].add(fact)
        undirected.add_edge(*ends)
    hubs = {v for v in range(len(graph)) if graph.degrees[v] > hub_degree and v not in topics and v != answer}
    undirected.remove_nodes_from(hubs)
    lengths = {}
    for topic in topics:
        if networkx.has_path(undirected, topic, answer):
            lengths[topic] = networkx.shortest_path_length(undirected, topic, answer)
    if not lengths or min(lengths.values()) > max_hops:
        return set(), -1
    least = min(lengths.values())
    facts = set()
    for topic in (t for t, length in lengths.items() if length == least):
        for path in networkx.all_shortest_paths(undirected, topic, answer):
            for pair in itertools.pairwise(path):
                facts |= between[frozenset(pair)]
    return facts, least


@pytest.mark.parametrize("hub_degree", [3, 6, 1000])
@pytest.mark.parametrize("max_hops", [1, 2, 4])
def test_mined_paths_are_all_shortest_ones(make_graph, max_hops, hub_degree):
    rng = random.Random(1)
    lengths = set()
    for seed in range(6):
        graph = make_graph(seed)
        miner = Miner(graph, max_hops, hub_degree)
        for _ in range(15):
            topics = rng.sample(range(len(graph)), rng.choice([1, 1, 2]))
            answers = rng.sample(range(len(graph)), rng.choice([1, 3]))
            paths = miner.mine(topics, answers)
            slow = [slow_paths(graph, topics, answer, max_hops, hub_degree) for answer in answers]
            assert paths.hops.tolist() == [length for _, length in slow]
            assert paths.facts.tolist() == sorted(set().union(*(facts for facts, _ in slow)))
            lengths.update(paths.hops.tolist())
    assert lengths >= {-1, 0, 1} and (max_hops == 1 or 2 in lengths)
    assert len(miner.mine([0], []).facts) == 0


@pytest.mark.parametrize("hub_degree", [3, 1000])
def test_the_facts_around(make_graph, hub_degree):
    for seed in range(4):
        graph = make_graph(seed)
        for hops in (1, 2, 3):
            topic = seed + hops
            layer, seen, expected, layers = {topic}, {topic}, set(), []
            for hop in range(hops):
                through = {v for v in layer if hop == 0 or graph.degrees[v] <= hub_degree}
                facts = {f for f in range(graph.num_facts) if {int(graph.heads[f]), int(graph.tails[f])} & through}
                layers.append(facts - expected)
                expected |= facts
                layer = {int(v) for f in facts for v in (graph.heads[f], graph.tails[f])} - seen
                seen |= layer
            found = neighbourhood(graph, [topic], hops, hub_degree)
            assert found.facts.tolist() == sorted(expected) and found.complete
            if len(expected) > 2:
                some = neighbourhood(graph, [topic], hops, hub_degree, len(expected) - 1)
                assert not some.complete and len(some.facts) == len(expected) - 1
                last = next(facts for facts in reversed(layers) if facts)
                assert expected - set(some.facts.tolist()) <= last  # what is near stays
