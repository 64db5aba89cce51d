"""Names in questions."""

from __future__ import annotations

import pytest

from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
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
