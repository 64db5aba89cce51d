"""Facts drawn as a graph."""

from __future__ import annotations

from nanochat.kg.drawing import PLAIN, draw, groups

FILMS = [
    ("Titanic", "directed_by", "James Cameron"),
    ("James Cameron", "born_in", "Kapuskasing"),
    ("Titanic", "starred_actors", "Kate Winslet"),
    ("Avatar", "directed_by", "James Cameron"),
]


def test_facts_of_one_entity_stand_together_and_arrows_go_from_head_to_tail():
    assert [line for _, line in draw(FILMS[:3])] == [
        "Titanic        ─directed_by────→ James Cameron",
        "               ─starred_actors─→ Kate Winslet",
        "James Cameron  ─born_in────────→ Kapuskasing",
    ]
    assert draw(FILMS, PLAIN) == [
        (0, "James Cameron  <-directed_by---- Titanic"),
        (1, "               -born_in--------> Kapuskasing"),
        (3, "               <-directed_by---- Avatar"),
        (2, "Titanic        -starred_actors-> Kate Winslet"),
    ]


def test_every_fact_is_drawn_once():
    facts = [*FILMS, ("a", "is", "a"), ("b", "is", "c")]
    found = groups(facts)
    assert sorted(at for _, own in found for at in own) == list(range(len(facts)))
    assert all(entity in (facts[at][0], facts[at][2]) for entity, own in found for at in own)
    assert [own[0] for _, own in found] == sorted(own[0] for _, own in found)
    assert draw([]) == []


def test_wide_letters_and_long_names():
    lines = [line for _, line in draw([("東京", "in", "日本"), ("Tokyo", "in", "Japan"), ("x" * 50, "in", "y")])]
    assert [line.replace("x" * 50, "").index("─in") for line in lines[:2]] == [32, 34]  # 東京 is four columns wide
    assert lines[2] == f"{'x' * 50}  ─in─→ y"
