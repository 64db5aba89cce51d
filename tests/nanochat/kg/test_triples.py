"""Facts from every kind of file, and what is said about lines that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.kg.triples import read_facts


def facts_of(tmp_path: Path, text: str, name: str = "kb.txt"):
    path = tmp_path / name
    (gzip.open if name.endswith(".gz") else open)(path, "wt", encoding="utf-8").write(text)
    facts = read_facts([path])
    names = zip(facts.heads.tolist(), facts.relations.tolist(), facts.tails.tolist(), strict=True)
    return facts, [(facts.entities[h], facts.relation_names[r], facts.entities[t]) for h, r, t in names]


N_TRIPLES = r"""
# a comment
<http://rdf.freebase.com/ns/m.01> <http://rdf.freebase.com/ns/people.person.name> "Zoë \"Z\" O\u0027Neil\n"@en .
<http://rdf.freebase.com/ns/m.01>	<http://rdf.freebase.com/ns/person.born>	<http://rdf.freebase.com/ns/m.02>	.
_:b1 <http://example.org/knows> _:b2 .
<http://rdf.freebase.com/ns/m.02> <http://rdf.freebase.com/ns/height> "1.8"^^<http://www.w3.org/2001/XMLSchema#float> .
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b|r|c\n\n c |r| d\n", [("a b", "r", "c"), ("c", "r", "d")]),
        ("a|b\tr\tc\n", [("a|b", "r", "c")]),
        (
            N_TRIPLES,
            [
                ("m.01", "people.person.name", 'Zoë "Z" O\'Neil\n'),
                ("m.01", "person.born", "m.02"),
                ("_:b1", "http://example.org/knows", "_:b2"),
                ("m.02", "height", "1.8"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("name", ["kb.txt", "kb.nt.gz"])
def test_formats(tmp_path, text, expected, name):
    facts, read = facts_of(tmp_path, text, name)
    assert read == expected and not facts.counts


def test_what_is_left_out_is_counted_and_shown(tmp_path):
    text = "a|r|b\na|r\nb|r|b\na|r|b\n|r|x\na|q|b\nb|r|a\na|r|b\nx|y|z|w\nno\nno\n"
    facts, read = facts_of(tmp_path, text)
    assert read == [("a", "r", "b"), ("a", "q", "b"), ("b", "r", "a")]
    assert facts.lines == 11
    assert facts.counts == {
        "lines that are no fact": 5,
        "facts of an entity with itself": 1,
        "facts that were there before": 2,
    }
    assert facts.left_out["facts that were there before"] == ["kb.txt:4: 'a|r|b'", "kb.txt:8: 'a|r|b'"]
    assert (
        "left out: 5 lines that are no fact (kb.txt:2: 'a|r'; kb.txt:5: '|r|x'; kb.txt:9: 'x|y|z|w'; ...)"
        in facts.report
    )
    assert facts.report.startswith("3 facts about 2 entities, 2 relations")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nothing.txt: No such file"):
        read_facts([tmp_path / "nothing.txt"])
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(UserError, match=r"no fact in .*empty.txt: a line is subject"):
        read_facts([tmp_path / "empty.txt"])
    whole = gzip.compress(b"a|r|b\n" * 1000)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.gz: the file ends in the middle"):
        read_facts([tmp_path / "cut.gz"])
    (tmp_path / "no.gz").write_bytes(b"a|r|b\n")
    with pytest.raises(UserError, match=r"no.gz: "):
        read_facts([tmp_path / "no.gz"])
