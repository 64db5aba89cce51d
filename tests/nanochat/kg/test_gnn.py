"""The graph network against a loop over edges, torch_geometric, and what must not change its scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.kg.coverage import ground
from nanochat.kg.gnn import (
    FactRetriever,
    RetrieverConfig,
    Step,
    gatv2_weights,
    log_softmax_by,
    softmax_by,
    weighted_sum,
)
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.question_encoder import build_vocabulary
from nanochat.kg.subgraphs import find_subgraphs, make_batch
from nanochat.kg.triples import read_facts

KINDS = ["steps", "gat"]


def make_retriever(films, kind: str) -> FactRetriever:
    torch.manual_seed(0)
    vocabulary = build_vocabulary([*films.subgraphs.texts, *films.graph.relation_names])
    return FactRetriever(RetrieverConfig(kind=kind, width=16, heads=2), vocabulary).eval()


def test_gatv2_equals_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    N, E, H, D = 30, 120, 4, 16
    states = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    edges = torch.randn(E, D, dtype=torch.float64)
    ends = torch.randint(N, (2, E))
    peer = geometric.GATv2Conv(D, D // H, heads=H, edge_dim=D, add_self_loops=False).double()
    expected = peer(states, ends, edges)

    source, target, edge = peer.lin_l(states), peer.lin_r(states), peer.lin_edge(edges)
    source, target, edge = (x.unflatten(-1, (H, -1)) for x in (source, target, edge))
    weights = gatv2_weights(source, target, edge, peer.att[0], *ends)
    found = weighted_sum(weights, source[ends[0]], ends[1], N).flatten(1) + peer.bias
    assert torch.allclose(found, expected)
    up = torch.randn_like(found)
    assert torch.allclose(*(torch.autograd.grad(out, states, up)[0] for out in (found, expected)))


def test_a_step_is_what_a_loop_over_edges_makes(films):
    torch.manual_seed(0)
    batch = make_batch(films.graph, films.subgraphs, [0, 9])
    N, D, rows = len(batch.nodes), 8, 12
    step = Step(D)
    states, active, table = torch.rand(N, D), torch.rand(N), torch.randn(rows, D)
    row = torch.randint(rows, batch.edge_from.shape)
    told = torch.zeros(N, D)
    for start, end, which in zip(batch.edge_from, batch.edge_to, row, strict=True):
        told[end] += active[start] * F.relu(step.message(table[which]))
    expected = F.relu(step.update(torch.cat([states, (1 + told).log()], dim=-1)))
    found, now_active = step(states, active, table, row, batch)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(now_active, step.on_the_way(expected)[:, 0].sigmoid(), atol=1e-5)


def test_softmax_of_groups():
    torch.manual_seed(0)
    scores, group = torch.randn(40, 3) * 50, torch.randint(5, (40,))
    found, logs = softmax_by(scores, group, 7), log_softmax_by(scores[:, 0], group, 7)
    for at in range(5):
        assert torch.allclose(found[group == at], scores[group == at].softmax(0))
        assert torch.allclose(logs[group == at], scores[group == at, 0].log_softmax(0), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_scores_the_same_alone_and_in_a_batch(films, kind):
    retriever = make_retriever(films, kind)
    chosen = [3, 700 % len(films.grounded), 50, 3]
    together = retriever(make_batch(films.graph, films.subgraphs, chosen))
    alone = [retriever(make_batch(films.graph, films.subgraphs, [question])) for question in chosen]
    for name in ("facts", "ends", "vectors", "nodes"):
        each = torch.cat([getattr(scored, name) for scored in alone])
        assert torch.allclose(getattr(together, name), each, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_know_no_entity(films, kind, tmp_path):
    """Other names, in another order: each fact has the score it had."""
    graph, retriever = films.graph, make_retriever(films, kind)
    rng = np.random.default_rng(0)
    new = rng.permutation(len(graph))
    order = rng.permutation(graph.num_facts)
    lines = [f"E{new[graph.heads[f]]}|{graph.relation_names[graph.relations[f]]}|E{new[graph.tails[f]]}" for f in order]
    (tmp_path / "kb.txt").write_text("\n".join(lines))
    other = Graph.build(read_facts([tmp_path / "kb.txt"]))
    linker = Linker(other)
    grounded = [
        ground(replace(one.question, topics=[f"E{new[v]}" for v in one.topics], answers=["E0"]), linker)
        for one in films.grounded[:8]
    ]
    renamed = find_subgraphs(other, films.subgraphs.texts[:8], grounded)
    chosen = range(8)
    a, b = make_batch(graph, films.subgraphs, chosen), make_batch(other, renamed, chosen)
    was = {(g, int(f)): s for g, f, s in zip(a.graph_of_fact.tolist(), a.facts, retriever(a).facts, strict=True)}
    now = {(g, int(order[f])): s for g, f, s in zip(b.graph_of_fact.tolist(), b.facts, retriever(b).facts, strict=True)}
    assert was.keys() == now.keys()
    assert all(torch.allclose(was[fact], now[fact], atol=1e-4) for fact in was)


@pytest.mark.parametrize("kind", KINDS)
def test_question_and_direction_matter(films, kind):
    retriever = make_retriever(films, kind)
    batch = make_batch(films.graph, films.subgraphs, [0])
    before = retriever(batch)
    assert not torch.allclose(before.facts, retriever(replace(batch, texts=["what did it direct"])).facts)
    turned = retriever(replace(batch, heads=batch.tails, tails=batch.heads))
    assert not torch.allclose(before.vectors, turned.vectors)
    R = len(batch.relation_names)
    assert not torch.allclose(
        before.nodes, retriever(replace(batch, edge_relation=(batch.edge_relation + R) % (2 * R))).nodes
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_score(films, kind):
    nowhere = replace(films.grounded[0], topics=[])
    subgraphs = find_subgraphs(films.graph, ["what?", "", "who directed it"], [nowhere, nowhere, films.grounded[0]])
    retriever = make_retriever(films, kind)
    assert len(retriever(make_batch(films.graph, subgraphs, [0, 1])).facts) == 0
    mixed = retriever(make_batch(films.graph, subgraphs, [0, 2, 1])).facts
    assert torch.allclose(mixed, retriever(make_batch(films.graph, subgraphs, [2])).facts, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_scores_the_same(films, kind, tmp_path):
    retriever = make_retriever(films, kind)
    batch = make_batch(films.graph, films.subgraphs, [0, 30])
    retriever.save(tmp_path / "retriever")
    assert sorted(path.suffix for path in (tmp_path / "retriever").iterdir()) == [".json", ".safetensors"]
    assert torch.equal(FactRetriever.load(tmp_path / "retriever")(batch).facts, retriever(batch).facts)
    (tmp_path / "retriever" / "retriever.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        FactRetriever.load(tmp_path / "retriever")
    with pytest.raises(UserError, match=r"has no retriever: .*retriever.json"):
        FactRetriever.load(tmp_path)
