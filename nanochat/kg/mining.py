"""The facts around a question's entities, among which a retriever chooses, and the shortest paths from there to the
answers, from which it learns first.

Breadth first over the graph's arrays, a whole layer at a time, in both directions of every fact. Entities of very many
facts ("Drama", "English") are reached and not gone through: a path over them says nothing, and they lead everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.kg.graph import Graph

UNSEEN = np.iinfo(np.int8).max


@dataclass
class Paths:
    """facts: those on any shortest path, ascending. hops: how far each answer is, -1 where it was not reached."""

    facts: np.ndarray
    hops: np.ndarray


class Miner:
    """One graph, many questions. hub_degree: entities with more edges than this are not gone through, other than those
    that the question names."""

    def __init__(self, graph: Graph, max_hops: int = 3, hub_degree: int = 100):
        self.graph, self.max_hops, self.hub_degree = graph, max_hops, hub_degree
        self._distance = np.full(len(graph), UNSEEN, dtype=np.int8)  # from the topics; as it was after each question

    def mine(self, topics: Sequence[int], answers: Sequence[int]) -> Paths:
        """topics, answers: entities."""
        graph, distance = self.graph, self._distance
        answers = np.asarray(answers, dtype=np.int64)
        layers = [np.unique(np.asarray(topics, dtype=np.int64))]
        distance[layers[0]] = 0
        try:
            while len(layers) <= self.max_hops and (distance[answers] == UNSEEN).any():
                through = layers[-1]
                if len(layers) > 1:
                    through = through[graph.degrees[through] <= self.hub_degree]
                reached = graph.neighbours[graph.edges_of(through)]
                reached = np.unique(reached[distance[reached] == UNSEEN])
                if not len(reached):
                    break
                distance[reached] = len(layers)
                layers.append(reached.astype(np.int64))
            hops = distance[answers]
            found: list[np.ndarray] = []
            ends = np.zeros(0, dtype=np.int64)
            for hop in range(len(layers) - 1, 0, -1):
                ends = np.union1d(ends, answers[hops == hop])
                places = graph.edges_of(ends)
                before = graph.neighbours[places]
                good = distance[before] == hop - 1
                if hop > 1:
                    good &= graph.degrees[before] <= self.hub_degree
                edges = graph.edges[places[good]]
                found.append(np.where(edges < 0, ~edges, edges))
                ends = np.unique(before[good]).astype(np.int64)
        finally:
            for layer in layers:
                distance[layer] = UNSEEN
        facts = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int32)
        return Paths(facts, np.where(hops == UNSEEN, -1, hops).astype(np.int64))


@dataclass
class Neighbourhood:
    """facts: ascending. complete: whether all were taken, or max_facts cut some of the last layer off."""

    facts: np.ndarray
    complete: bool


def neighbourhood(
    graph: Graph, topics: Sequence[int], max_hops: int = 3, hub_degree: int = 100, max_facts: int = 4096
) -> Neighbourhood:
    """The facts within max_hops of the topics. Of a layer that does not fit, those of entities with few facts come
    first: one fact among three says more of an entity than one among ninety."""
    layer = np.unique(np.asarray(topics, dtype=np.int64))
    taken = np.zeros(0, dtype=np.int64)
    seen = layer
    for hop in range(max_hops):
        through = layer if hop == 0 else layer[graph.degrees[layer] <= hub_degree]
        places = graph.edges_of(through)
        edges = graph.edges[places]
        facts = np.where(edges < 0, ~edges, edges)
        room = max_facts - len(taken)
        new, first = np.unique(facts, return_index=True)
        fresh = ~np.isin(new, taken, assume_unique=True)
        new, first = new[fresh], first[fresh]
        if len(new) > room:
            degree = np.repeat(graph.degrees[through], graph.degrees[through])[first]
            chosen = np.argsort(degree, kind="stable")[:room]
            return Neighbourhood(np.sort(np.concatenate([taken, new[chosen]])), False)
        taken = np.concatenate([taken, new])
        layer = np.setdiff1d(graph.neighbours[places], seen).astype(np.int64)
        seen = np.union1d(seen, layer)
        if not len(layer):
            break
    return Neighbourhood(np.sort(taken), True)
