"""Names in questions."""

from __future__ import annotations

import random
import types

import pytest

from nanochat.kg import names as names_module
from nanochat.kg.graph import Graph
from nanochat.kg.linking import _FUNCTION_WORDS, Linker
from nanochat.kg.names import words
from nanochat.kg.triples import read_facts

FACTS = """
The Matrix|directed_by|Lana Wachowski
Matrix|is|other
Matrix Reloaded|directed_by|Lana Wachowski
It|is|movie
Amélie|starred|Audrey Tautou
$|is|movie
Who's Who|is|movie
who s who|is|book
Some Mother's Son|is|movie
"""


@pytest.fixture
def linker(tmp_path):
    path = tmp_path / "kb.txt"
    path.write_text(FACTS, encoding="utf-8")
    return Linker(Graph.build(read_facts([path])), [("Neo's film", "The Matrix"), ("x", "nobody")])


def names(linker, question):
    return [(m.text, [linker.graph.name(e) for e in m.entities]) for m in linker.link(question)]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("who directed The Matrix?", [("The Matrix", ["The Matrix"])]),
        (
            "who directed the MATRIX reloaded",
            [("MATRIX reloaded", ["Matrix Reloaded"])],
        ),  # two words, and further right
        ("was matrix by LANA wachowski?", [("matrix", ["Matrix"]), ("LANA wachowski", ["Lana Wachowski"])]),
        ("who is in amelie, and who in Ame\u0301lie", [("amelie", ["Amélie"]), ("Ame\u0301lie", ["Amélie"])]),
        ("is it good", []),
        ("who plays in [It]", [("It", ["It"])]),
        ("[who directed] [The Matrix] or matrix", [("The Matrix", ["The Matrix"])]),
        ("the price of [$]", [("$", ["$"])]),
        ("is neos film or Neo's film", [("Neo's film", ["The Matrix"])]),
        ("in Who's who?", [("Who's who", ["Who's Who", "who s who"])]),
        ("the son in some mother's son", [("some mother's son", ["Some Mother's Son"])]),
        ("", []),
        ("?!", []),
    ],
)
def test_links(linker, question, expected):
    assert names(linker, question) == expected
    for mention in linker.link(question):
        assert question[mention.start : mention.end] == mention.text


def test_the_exact_name_comes_first(linker):
    assert [linker.graph.name(e) for e in linker.entities("who s who")] == ["who s who"]
    assert [linker.graph.name(e) for e in linker.entities("WHO S WHO")] == ["Who's Who", "who s who"]
    assert linker.entities("x") == linker.entities("nobody") == linker.entities("") == ()


def slow_link(called: list[tuple[str, int]], question: str) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, end, entities) by going through all names at all places. called: names and aliases with entities."""
    found = words(question)
    spans = []
    for first in range(len(found)):
        for end in range(first + 1, len(found) + 1):
            span = [word for _, _, word in found[first:end]]
            entities = dict.fromkeys(e for name, e in called if [word for _, _, word in words(name)] == span)
            telling = sum(word not in _FUNCTION_WORDS for word in span)
            if entities and (telling or len(span) > 1):
                spans.append((-telling, -len(span), first, tuple(entities)))
    taken, mentions = set(), []
    for _, length, first, entities in sorted(spans):
        if not taken & {*range(first, first - length)}:
            taken |= {*range(first, first - length)}
            mentions.append((found[first][0], found[first - length - 1][1], entities))
    return sorted(mentions)


@pytest.mark.parametrize("collisions", [False, True])
def test_a_saved_index_finds_what_going_through_all_names_finds(tmp_path, monkeypatch, collisions):
    if collisions:  # a hash of three values: names must be compared
        hashed = types.SimpleNamespace(__wrapped__=lambda text: len(text) % 3)
        monkeypatch.setattr(names_module, "hash64", hashed)
    rng = random.Random(0)
    vocabulary = ["The", "of", "Élan", "elan", "Kor", "KOR", "mi", "Mi!", "it", "été", "日本"]
    called = list(dict.fromkeys(" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))) for _ in range(80)))
    (tmp_path / "kb.txt").write_text("".join(f"{name}|is|{called[0]}\n" for name in called[1:]), encoding="utf-8")
    Graph.build(read_facts([tmp_path / "kb.txt"])).save(tmp_path / "kg")
    graph = Graph.load(tmp_path / "kg")
    aliases = [(" ".join(rng.choices(vocabulary, k=rng.randint(1, 6))), rng.choice(called)) for _ in range(10)]
    linker = Linker(graph, aliases)
    known = [(graph.name(e), e) for e in range(len(graph))] + [(alias, graph.find(name)) for alias, name in aliases]
    several = 0
    for _ in range(200):
        question = " ".join(rng.choices([*vocabulary, "who", "?"], k=rng.randint(1, 12)))
        mentions = [(m.start, m.end, m.entities) for m in linker.link(question)]
        assert mentions == slow_link(known, question)
        several += any(len(entities) > 1 for _, _, entities in mentions)
    assert several > 50
