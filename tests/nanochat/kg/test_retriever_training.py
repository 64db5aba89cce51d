"""The retriever's loss and figures against slow ones; and whether it learns what holds for entities it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.kg.gnn import FactRetriever, RetrieverConfig, Scored
from nanochat.kg.question_encoder import build_vocabulary
from nanochat.kg.retriever_training import (
    LossConfig,
    TrainingConfig,
    evaluate_retriever,
    listwise,
    retriever_loss,
    train_retriever,
)
from nanochat.kg.subgraphs import LAST, make_batch


def random_scores(batch) -> Scored:
    F_, N = len(batch.facts), len(batch.nodes)
    return Scored(torch.randn(F_), torch.randn(F_, 2), torch.zeros(F_, 1), torch.randn(N))


def test_listwise_against_a_loop():
    torch.manual_seed(0)
    logits, group, worth = torch.randn(30), torch.randint(4, (30,)), torch.rand(30)
    worth[group == 2] = 0  # nothing of worth: does not count
    expected = []
    for at in (0, 1, 3):
        own = group == at
        expected.append(-((worth[own] / worth[own].sum()) * logits[own].log_softmax(0)).sum())
    assert torch.allclose(listwise(logits, worth, group, 5), torch.stack(expected).mean())


def test_loss_against_a_loop(films):
    torch.manual_seed(0)
    chosen = [films.hops.index(hops) for hops in (1, 2, 3)]
    batch = make_batch(films.graph, films.subgraphs, chosen)
    scored = random_scores(batch)
    config = LossConfig(bce=0.7, ranking=0.3, nodes=0.5, ends=0.2, last=3.0)
    parts = retriever_loss(scored, batch, config)
    bce, ranking, nodes, ends = [], [], [], []
    for at in range(3):
        own, label = batch.graph_of_fact == at, batch.labels[batch.graph_of_fact == at]
        paths = (label > 0).sum()
        bce.append(F.binary_cross_entropy_with_logits(scored.facts[own], (label > 0).float(), reduction="sum") / paths)
        worth = torch.tensor([{0: 0.0, 1: 1.0, LAST: 3.0}[one] for one in label.tolist()])
        ranking.append(-(worth / worth.sum() * scored.facts[own].log_softmax(0)).sum())
        answer = batch.is_answer[batch.graph_of_node == at]
        nodes.append(-scored.nodes[batch.graph_of_node == at].log_softmax(0)[answer].mean())
        is_answer = torch.stack([batch.is_answer[batch.heads[own]], batch.is_answer[batch.tails[own]]], dim=1).float()
        ends.append(F.binary_cross_entropy_with_logits(scored.ends[own], is_answer, reduction="sum") / paths / 2)
    expected = {"bce": bce, "ranking": ranking, "nodes": nodes, "ends": ends}
    for name, each in expected.items():
        assert torch.allclose(parts[name], torch.stack(each).mean(), rtol=1e-4), name
    total = sum(getattr(config, name) * parts[name] for name in expected)
    assert torch.allclose(parts["loss"], total)


def test_figures_against_a_loop(films):
    """Scores by fact and by node, whatever batch they come in."""
    rng = np.random.default_rng(0)
    by_fact = torch.from_numpy(rng.normal(size=films.graph.num_facts)).float()
    by_end = torch.from_numpy(rng.normal(size=(films.graph.num_facts, 2))).float()
    by_entity = torch.from_numpy(rng.normal(size=len(films.graph))).float()

    class Fixed(torch.nn.Module):
        topic = torch.zeros(1)

        def forward(self, batch):
            facts = torch.from_numpy(batch.facts).long()
            return Scored(by_fact[facts], by_end[facts], by_fact[facts][:, None], by_entity[batch.nodes])

    graph, subgraphs = films.graph, films.subgraphs
    chosen = list(range(0, len(subgraphs), 9))
    expected: dict[str, list[float]] = {}
    for question in chosen:
        own = slice(*subgraphs.fact_starts[question : question + 2])
        nodes = subgraphs.nodes[slice(*subgraphs.node_starts[question : question + 2])]
        answers = set(films.grounded[question].answers)
        facts, labels = subgraphs.facts[own], subgraphs.labels[own]
        ranked = sorted(range(len(facts)), key=lambda at: -by_fact[facts[at]].item())
        best = facts[ranked[0]]
        end = graph.tails[best] if by_end[best, 1] > by_end[best, 0] else graph.heads[best]
        row = {
            "node_hits@1": max(nodes, key=lambda node: by_entity[node].item()) in answers,
            "fact_hits@1": end in answers,
        }
        for k in (2, 10):
            touched = {int(end[facts[at]]) for at in ranked[:k] for end in (graph.heads, graph.tails)}
            row[f"any@{k}"] = bool(touched & answers)
            row[f"all@{k}"] = answers <= touched
            row[f"path_recall@{k}"] = sum(labels[ranked[:k]] > 0) / min(k, sum(labels > 0))
        for name, value in row.items():
            expected.setdefault(name, []).append(float(value))
    found = evaluate_retriever(Fixed(), graph, subgraphs, chosen, ks=(2, 10), max_facts=900)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values)), name


@pytest.mark.parametrize(("kind", "width", "epochs"), [("steps", 64, 8), ("gat", 32, 5)])
def test_learned_from_some_entities_it_holds_for_others(films, kind, width, epochs):
    """Half of the topics are learned from, the others asked about; all of one, two and three facts."""
    order = np.random.default_rng(0).permutation(len(films.hops)).tolist()
    held = [q for q in order if films.grounded[q].topics[0] % 2]
    train = [q for q in order if films.grounded[q].topics[0] % 2 == 0]
    torch.manual_seed(0)
    vocabulary = build_vocabulary([films.subgraphs.texts[q] for q in train] + films.graph.relation_names)
    retriever = FactRetriever(RetrieverConfig(kind=kind, width=width, heads=2), vocabulary)
    losses = []
    config = TrainingConfig(epochs=epochs, learning_rate=1e-2, max_facts=4096, max_questions=16)
    train_retriever(
        retriever,
        films.graph,
        films.subgraphs,
        train,
        config,
        LossConfig(),
        lambda step, steps, figures: losses.append(figures["loss"]),
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    figures = evaluate_retriever(retriever, films.graph, films.subgraphs, held)
    assert figures["any@5"] > 0.95 and figures["fact_hits@1"] > 0.9 and figures["node_hits@1"] > 0.9
    assert figures["path_recall@10"] > 0.9


def test_the_same_seed_gives_the_same_retriever(films):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        vocabulary = build_vocabulary(films.subgraphs.texts)
        retriever = FactRetriever(RetrieverConfig(width=16), vocabulary)
        config = TrainingConfig(epochs=1, max_questions=16)
        train_retriever(retriever, films.graph, films.subgraphs, range(100), config, LossConfig())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in retriever.parameters()]))
    assert torch.equal(*weights)
