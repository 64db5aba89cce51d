"""The subgraphs that questions are asked of, found once and held as flat arrays, and many of them as one batch.

    subgraphs = find_subgraphs(graph, [question_text(one, linker) for one in grounded], grounded)
    batch = make_batch(graph, subgraphs, [0, 5, 7])

A batch is one graph of several parts that do not touch: the nodes and facts of the second question follow those of the
first, so that a layer runs over all of them at once.

    Q questions held, G questions of a batch, N nodes, F facts, E = 2F edges
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.kg.coverage import Grounded
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.mining import Miner, neighbourhood

TOPIC = "topicentity"  # stands for the names of the topics: what is learned from one name must hold for any other
PATH, LAST = 1, 2  # labels of a fact: on a shortest path to an answer; the last of one


def question_text(grounded: Grounded, linker: Linker) -> str:
    """The question with TOPIC for every mention of its topics."""
    text, topics = grounded.question.text, set(grounded.topics)
    shown, at = [], 0
    for mention in linker.link(text):
        if topics.isdisjoint(mention.entities):
            continue
        bracketed = text[mention.start - 1 : mention.start] == "[" and text[mention.end : mention.end + 1] == "]"
        shown += [text[at : mention.start - bracketed], TOPIC]
        at = mention.end + bracketed
    return "".join([*shown, text[at:]])


@dataclass
class Subgraphs:
    """texts: of the Q questions. Those of question q are node_starts[q] : node_starts[q + 1] of the arrays of nodes,
    and the same with fact_starts."""

    texts: list[str]
    node_starts: np.ndarray  # (Q + 1,)
    nodes: np.ndarray  # (N,) entities, ascending within a question
    is_topic: np.ndarray  # (N,) bool
    is_answer: np.ndarray  # (N,) bool
    fact_starts: np.ndarray  # (Q + 1,)
    facts: np.ndarray  # (F,) of the graph, ascending within a question
    heads: np.ndarray  # (F,) int16, a node of the question: 0 is its first
    tails: np.ndarray  # (F,)
    labels: np.ndarray  # (F,) 0, PATH or LAST
    path_facts: np.ndarray  # (Q,) how many are on the shortest paths, with those that max_facts has cut off
    answers: np.ndarray  # (Q,) how many entities answer it, with those that are not reached
    complete: np.ndarray  # (Q,) whether max_facts has cut nothing off

    def __len__(self) -> int:
        return len(self.texts)


def find_subgraphs(
    graph: Graph,
    texts: Sequence[str],
    grounded: Sequence[Grounded],
    max_hops: int = 3,
    hub_degree: int = 100,
    max_facts: int = 4096,
) -> Subgraphs:
    """texts: what the retriever reads of each question. Labels are nowhere set where answers are not known."""
    if max_facts > 16_000:
        raise UserError(f"max_facts is {max_facts}; it must be at most 16,000")  # two nodes each are numbers of 16 bits
    miner = Miner(graph, max_hops, hub_degree)
    columns: list[list[np.ndarray]] = [[] for _ in range(7)]
    path_facts, answers, complete = [], [], []
    for one in grounded:
        around = neighbourhood(graph, one.topics, max_hops, hub_degree, max_facts)
        facts = around.facts.astype(np.int32)
        ends = np.concatenate([graph.heads[facts], graph.tails[facts]])
        nodes, local = np.unique(np.concatenate([ends, np.asarray(one.topics, dtype=ends.dtype)]), return_inverse=True)
        heads, tails = local[: len(facts)], local[len(facts) : 2 * len(facts)]
        is_answer = np.isin(nodes, one.answers)
        mined = miner.mine(one.topics, one.answers).facts
        on_path = np.isin(facts, mined, assume_unique=True)
        labels = on_path * PATH + (on_path & (is_answer[heads] | is_answer[tails])) * (LAST - PATH)
        found = (nodes, np.isin(nodes, one.topics), is_answer, facts, heads, tails, labels)
        types = (np.int32, bool, bool, np.int32, np.int16, np.int16, np.int8)
        for column, values, dtype in zip(columns, found, types, strict=True):
            column.append(values.astype(dtype))
        path_facts.append(len(mined))
        answers.append(len(one.answers))
        complete.append(around.complete)
    node_starts, fact_starts = (np.cumsum([0, *map(len, columns[at])]) for at in (0, 3))
    nodes, is_topic, is_answer, facts, heads, tails, labels = map(np.concatenate, columns)
    return Subgraphs(
        list(texts),
        node_starts,
        nodes,
        is_topic,
        is_answer,
        fact_starts,
        facts,
        heads,
        tails,
        labels,
        np.array(path_facts),
        np.array(answers),
        np.array(complete),
    )


@dataclass
class Batch:
    """Nodes and facts of G questions, one question behind the other. heads and tails are nodes of the batch.
    Every fact is two edges, relation r from its head to its tail and R + r back; edges stand by the node they lead to,
    those of node v at edge_starts[v] and behind."""

    texts: list[str]
    relation_names: list[str]  # (R,)
    graph_of_node: Tensor  # (N,) which of the G questions
    is_topic: Tensor  # (N,) bool
    is_answer: Tensor  # (N,) bool
    nodes: np.ndarray  # (N,) entities
    graph_of_fact: Tensor  # (F,)
    heads: Tensor  # (F,)
    tails: Tensor  # (F,)
    relations: Tensor  # (F,)
    labels: Tensor  # (F,) 0, PATH or LAST
    facts: np.ndarray  # (F,) of the graph
    fact_starts: Tensor  # (G + 1,)
    edge_from: Tensor  # (E,)
    edge_to: Tensor  # (E,)
    edge_relation: Tensor  # (E,) below 2R
    edge_starts: Tensor  # (N + 1,)

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**(vars(self) | moved))


def make_batch(graph: Graph, subgraphs: Subgraphs, questions: Sequence[int]) -> Batch:
    """Of these questions, in this order."""
    chosen = np.asarray(questions, dtype=np.int64)
    nodes_at, node_counts = _rows(subgraphs.node_starts, chosen)
    facts_at, fact_counts = _rows(subgraphs.fact_starts, chosen)
    first_node = np.cumsum([0, *node_counts])[:-1]
    offset = np.repeat(first_node, fact_counts)
    facts = subgraphs.facts[facts_at]
    heads, tails = subgraphs.heads[facts_at] + offset, subgraphs.tails[facts_at] + offset
    relations = graph.relations[facts].astype(np.int64)
    to = np.concatenate([tails, heads])
    order = np.argsort(to.astype(np.int32), kind="stable")
    edges = (
        np.concatenate([heads, tails])[order],
        to[order],
        np.concatenate([relations, relations + len(graph.relation_names)])[order],
        np.cumsum([0, *np.bincount(to, minlength=len(nodes_at))]),
    )
    numbers = np.arange(len(chosen))
    return Batch(
        [subgraphs.texts[question] for question in chosen],
        graph.relation_names,
        torch.from_numpy(np.repeat(numbers, node_counts)),
        torch.from_numpy(subgraphs.is_topic[nodes_at]),
        torch.from_numpy(subgraphs.is_answer[nodes_at]),
        subgraphs.nodes[nodes_at],
        torch.from_numpy(np.repeat(numbers, fact_counts)),
        torch.from_numpy(heads),
        torch.from_numpy(tails),
        torch.from_numpy(relations),
        torch.from_numpy(subgraphs.labels[facts_at]),
        facts,
        torch.from_numpy(np.cumsum([0, *fact_counts])),
        *map(torch.from_numpy, edges),
    )


def _rows(starts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of all that these questions have, and how many each has."""
    counts = starts[chosen + 1] - starts[chosen]
    before = np.cumsum([0, *counts])[:-1]
    return np.repeat(starts[chosen] - before, counts) + np.arange(counts.sum()), counts


def batches(order: Sequence[int], subgraphs: Subgraphs, max_facts: int, max_questions: int = 64) -> list[list[int]]:
    """The questions in this order, as many at a time as have at most max_facts together (one at least)."""
    found: list[list[int]] = []
    room = 0
    sizes = np.diff(subgraphs.fact_starts)
    for question, size in zip(order, sizes[np.asarray(order, dtype=np.int64)].tolist(), strict=True):
        if not found or size > room or len(found[-1]) == max_questions:
            found.append([])
            room = max_facts
        found[-1].append(int(question))
        room -= size
    return found
