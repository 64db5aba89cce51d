"""Passages are whole sentences of one section, as many as fit, and lose nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.retrieval.chunking import chunk, count_words, sentences
from nanochat.retrieval.duplicates import near_duplicates
from nanochat.tokenizer import Tokenizer

TEXT = (
    'Dr. J. Smith met e.g. Mr. Brown in 1990. "Really?" she said. It was 3.5 km [2] long.[3] Yes!\n\n- first item\n'
    "- second item.\nA line. Inc. was founded by Ada Lind Ltd. in Vienna.\n\n今日は。明日は！"
)


def pieces(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def test_sentences_end_where_a_reader_ends_them():
    assert pieces(TEXT, sentences(TEXT)) == [
        "Dr. J. Smith met e.g. Mr. Brown in 1990.",
        '"Really?" she said.',
        "It was 3.5 km [2] long.[3]",
        "Yes!",
        "- first item",
        "- second item.",
        "A line.",
        "Inc. was founded by Ada Lind Ltd. in Vienna.",
        "今日は。",
        "明日は！",
    ]
    assert sentences("  \n ") == [] and sentences("no point") == [(0, 8)]


def numbered(count: int, words: int = 9) -> str:
    return " ".join(f"S{n} " + "word " * (words - 2) + "end." for n in range(count))


def test_a_passage_has_as_many_sentences_as_fit():
    text = numbered(10)  # of 10 words and signs each, and one for the space before
    found = pieces(text, chunk(text, 33))
    assert [len(re.findall(r"S\d", passage)) for passage in found] == [3, 3, 3, 1]
    assert all(passage.endswith(".") for passage in found)
    assert " ".join(found) == text


def test_overlap_repeats_whole_sentences_and_no_more_than_asked():
    text = numbered(9)
    found = [re.findall(r"S(\d)", passage) for passage in pieces(text, chunk(text, 44, overlap=12))]
    assert found == [list("0123"), list("3456"), list("678")]
    assert chunk(text, 44, overlap=10) == chunk(text, 44)  # too little for a sentence
    with pytest.raises(ValueError, match="overlap"):
        chunk(text, 20, overlap=20)


def test_a_section_begins_a_passage_unless_the_one_before_is_short():
    long, short = numbered(3), "One line."
    text = f"{long}\n\n{short}\n\n{long}"
    at = [len(long) + 2, len(long) + len(short) + 4]
    assert pieces(text, chunk(text, 60, sections=at)) == [long, text[at[0] :]]
    # an overlap does not reach into the section before
    both = f"{numbered(5)}\n\n{numbered(5)}"
    middle = len(numbered(5)) + 2
    found = pieces(both, chunk(both, 44, overlap=22, sections=[middle]))
    assert any(passage.startswith("S0") and both.index(passage, middle) == middle for passage in found[1:])


def test_what_does_not_fit_is_cut_between_words_and_endless_words_anywhere():
    text = "word " * 100 + "x" * 1000 + "."
    found = pieces(text, chunk(text, 20))
    assert "".join(found).replace(" ", "") == text.replace(" ", "")
    assert all(count_words([passage])[0] <= 20 for passage in found)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT, numbered(20)], 300)


ALPHABET = st.sampled_from([*"ab .\n!A1’-[](é今。", "word ", "End. ", "\n\n", "Dr. "])


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(ALPHABET, max_size=120),
    size=st.integers(8, 40),
    overlap=st.integers(0, 7),
    cuts=st.lists(st.integers(0, 200)),
)
def test_nothing_is_lost_and_nothing_is_too_long(tokenizer, parts, size, overlap, cuts):
    text = "".join(parts)
    found = chunk(text, size, overlap, cuts, lambda texts: [len(tokenizer.encode(one)) for one in texts])
    covered = [False] * len(text)
    for start, end in found:
        assert len(tokenizer.encode(text[start:end])) <= size
        covered[start:end] = [True] * (end - start)
    assert all(covered[at] or text[at].isspace() for at in range(len(text)))
    assert [start for start, _ in found] == sorted({start for start, _ in found})
    assert [end for _, end in found] == sorted({end for _, end in found})


def test_near_duplicates_are_those_an_exact_comparison_finds():
    base = [f"w{n}" for n in range(100)]
    texts = [" ".join(base)]
    for change in (1, 2, 8, 40):  # words changed, far from each other
        words = list(base)
        for at in range(change):
            words[at * 100 // change] = "x"
        texts.append(" ".join(words))
    texts += ["another text", "Another text!", ""]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}

    kept: list[int] = []
    expected = {}
    for n, text in enumerate(texts):
        near = [k for k in kept if len(grams(text) & grams(texts[k])) / len(grams(text) | grams(texts[k])) >= 0.8]
        if near:
            expected[n] = near[0]
        else:
            kept.append(n)
    assert near_duplicates(texts) == expected and expected == {1: 0, 2: 0, 6: 5}
