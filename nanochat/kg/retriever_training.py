"""The first phase of D-RAG: the retriever learns from mined shortest paths, before any generator is there.

The loss is .7 binary cross-entropy + .3 ranking, as in the paper, and cross-entropy of the nodes that are answers: a
mined path can be one that the question does not ask for (Drama is a genre of the film itself, too), an answer cannot.

    G questions of a batch, N nodes, F facts
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kg.gnn import FactRetriever, Scored, log_softmax_by
from nanochat.kg.graph import Graph
from nanochat.kg.subgraphs import LAST, Batch, Subgraphs, batches, make_batch


@dataclass
class LossConfig:
    bce: float = 0.7
    ranking: float = 0.3
    nodes: float = 0.5
    """Of answers among the nodes."""
    ends: float = 0.1
    """Of which end of a fact is an answer."""
    last: float = 4.0
    """A last fact of a path, which has the answer, is worth so many of the others in the ranking."""


def retriever_loss(scored: Scored, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Each part, not yet weighted, and their sum as "loss". Every question with a path counts the same."""
    G = len(batch)
    positive = batch.labels > 0
    paths = _per_graph(positive, batch.graph_of_fact, G)
    asked = (paths > 0).sum().clamp(min=1)
    share = 1 / paths.clamp(min=1)  # of a question with many facts on paths each counts less
    share = torch.where(paths > 0, share, 0.0)[batch.graph_of_fact]

    def bce(logits: Tensor, target: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none") * share).sum() / asked

    worth = positive + (config.last - 1) * (batch.labels == LAST)
    ends = [batch.is_answer[end] for end in (batch.heads, batch.tails)]
    parts = {
        "bce": bce(scored.facts, positive),
        "ranking": listwise(scored.facts, worth, batch.graph_of_fact, G),
        "nodes": listwise(scored.nodes, batch.is_answer.float(), batch.graph_of_node, G),
        "ends": (bce(scored.ends[:, 0], ends[0]) + bce(scored.ends[:, 1], ends[1])) / 2,
    }
    weights = {"bce": config.bce, "ranking": config.ranking, "nodes": config.nodes, "ends": config.ends}
    return parts | {"loss": sum(weights[name] * part for name, part in parts.items())}


def listwise(logits: Tensor, worth: Tensor, group: Tensor, count: int) -> Tensor:
    """ListNet's top-one cross-entropy (Cao et al., 2007): worth (X,), made to sum to 1 within each group (X,), against
    the softmax of the group's logits (X,); mean over the groups that have something of worth."""
    total = _per_graph(worth, group, count)
    target = worth / total.clamp(min=1e-9)[group]
    return -(target * log_softmax_by(logits, group, count)).sum() / (total > 0).sum().clamp(min=1)


def _per_graph(values: Tensor, group: Tensor, count: int) -> Tensor:
    return torch.zeros(count, device=values.device).index_add_(0, group, values.float())


# --- training


@dataclass
class TrainingConfig:
    epochs: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    max_questions: int = 64
    """Of a batch, at most."""
    max_facts: int = 8192
    """Of a batch, at most."""
    warmup: float = 0.05
    """Part of all steps."""
    clip: float = 1.0
    seed: int = 0


def train_retriever(
    retriever: FactRetriever,
    graph: Graph,
    subgraphs: Subgraphs,
    questions: Sequence[int],
    config: TrainingConfig,
    loss_config: LossConfig,
    report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, figures: None,
) -> None:
    """On these questions, in a new order each epoch; the learning rate falls to zero as a cosine. report: called after
    every step with step, number of steps and figures."""
    device = retriever.topic.device
    rng = random.Random(config.seed)
    plan = []
    for _ in range(config.epochs):
        order = rng.sample(list(questions), len(questions))
        plan += batches(order, subgraphs, config.max_facts, config.max_questions)
    optimizer = torch.optim.AdamW(
        retriever.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    warmup = max(1, int(config.warmup * len(plan)))
    retriever.train()
    for step, chosen in enumerate(plan):
        falling = (1 + math.cos(math.pi * step / len(plan))) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / warmup) * falling
        batch = make_batch(graph, subgraphs, chosen).to(device)
        parts = retriever_loss(retriever(batch), batch, loss_config)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(retriever.parameters(), config.clip)
        optimizer.step()
        figures = {name: part.item() for name, part in parts.items()}
        report(step + 1, len(plan), figures | {"questions": len(chosen)})
    retriever.eval()


# --- evaluation


@torch.no_grad()
def evaluate_retriever(
    retriever: FactRetriever,
    graph: Graph,
    subgraphs: Subgraphs,
    questions: Sequence[int],
    ks: Sequence[int] = (5, 10, 20, 50, 100),
    max_facts: int = 65_536,
    score: Callable[[Scored], Tensor] = lambda scored: scored.facts,
) -> dict[str, float]:
    """Means over these questions. path_recall@k: of the facts on shortest paths, those among the k best; of k, where
    there are more. any@k, all@k: whether one answer, and every answer, is an end of the k best. node_hits@1: the best
    node is an answer. fact_hits@1: the end of the best fact that is more likely an answer, is one. score: (F,), by
    which facts are ranked."""
    device = retriever.topic.device
    was_training = retriever.training
    retriever.eval()
    rows: list[dict[str, float]] = []
    for chosen in batches(questions, subgraphs, max_facts):
        batch = make_batch(graph, subgraphs, chosen).to(device)
        scored = retriever(batch)
        ranked, ends, nodes = (x.cpu().numpy() for x in (score(scored), scored.ends, scored.nodes))
        heads, tails, labels = batch.heads.cpu().numpy(), batch.tails.cpu().numpy(), batch.labels.cpu().numpy()
        is_answer = batch.is_answer.cpu().numpy()
        node_starts = np.searchsorted(batch.graph_of_node.cpu().numpy(), np.arange(len(chosen) + 1))
        fact_starts = batch.fact_starts.tolist()
        for at, question in enumerate(chosen):
            first = fact_starts[at]
            best = first + np.argsort(-ranked[first : fact_starts[at + 1]], kind="stable")[: max(ks)]
            own = slice(node_starts[at], node_starts[at + 1])
            row = {"node_hits@1": float(own.stop > own.start and is_answer[own][np.argmax(nodes[own])])}
            answer = [(heads, tails)[int(ends[fact, 1] > ends[fact, 0])][fact] for fact in best[:1]]
            row["fact_hits@1"] = float(is_answer[answer].any())
            for k in ks:
                top = best[:k]
                touched = np.unique(np.concatenate([heads[top], tails[top]]))
                found = int(is_answer[touched].sum())
                row[f"any@{k}"] = float(found > 0)
                row[f"all@{k}"] = float(found > 0 and found == subgraphs.answers[question])
                if subgraphs.path_facts[question]:
                    row[f"path_recall@{k}"] = float((labels[top] > 0).sum() / min(k, subgraphs.path_facts[question]))
            rows.append(row)
    retriever.train(was_training)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
