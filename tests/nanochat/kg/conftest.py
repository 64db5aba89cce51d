"""A graph of films whose questions can be made up."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from nanochat.kg.coverage import Grounded, ground
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question
from nanochat.kg.subgraphs import Subgraphs, find_subgraphs, question_text
from nanochat.kg.triples import read_facts


@dataclass
class Films:
    graph: Graph
    grounded: list[Grounded]
    subgraphs: Subgraphs
    hops: list[int]


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Films:
    """Films with a director, actors and a genre; questions of one, two and three facts, by kind in a fixed order."""
    rng = random.Random(0)
    facts: dict[str, dict[str, set[str]]] = {"directed_by": {}, "starred_actors": {}, "has_genre": {}}
    for film in range(200):
        name = f"Film {film}x"
        facts["directed_by"][name] = {f"Director {rng.randrange(60)}x"}
        facts["starred_actors"][name] = {f"Actor {rng.randrange(120)}x" for _ in range(3)}
        facts["has_genre"][name] = {f"Genre {rng.randrange(20)}x"}
    lines = [f"{a}|{r}|{b}" for r, by in facts.items() for a, ends in by.items() for b in sorted(ends)]
    path = tmp_path_factory.mktemp("films") / "kb.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    graph = Graph.build(read_facts([path]))
    directed: dict[str, set[str]] = {}
    for film, people in facts["directed_by"].items():
        for person in people:
            directed.setdefault(person, set()).add(film)
    asked = []
    for film in facts["directed_by"]:
        asked.append((1, f"who directed [{film}]", facts["directed_by"][film]))
        asked.append((1, f"who played in the film {film}?", facts["starred_actors"][film]))
        (director,) = facts["directed_by"][film]
        others = directed[director] - {film}
        if genres := set().union(*(facts["has_genre"][other] for other in others)) - facts["has_genre"][film]:
            asked.append((3, f"which genres have other films of the director of [{film}]", genres))
    for director, theirs in directed.items():
        asked.append((1, f"what did {director} direct", theirs))
        actors = set().union(*(facts["starred_actors"][film] for film in theirs))
        asked.append((2, f"who played in the films directed by [{director}]", actors))
    linker = Linker(graph)
    questions = [Question(str(n), text, sorted(answers)) for n, (_, text, answers) in enumerate(asked)]
    grounded = [ground(question, linker) for question in questions]
    texts = [question_text(one, linker) for one in grounded]
    return Films(graph, grounded, find_subgraphs(graph, texts, grounded), [hops for hops, _, _ in asked])
