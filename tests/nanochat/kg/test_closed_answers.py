"""What a closed answer may be, against all answers written out."""

from __future__ import annotations

import itertools

import torch

from nanochat.kg.closed_answers import ClosedAnswer, likeliest

BAR, END = 8, 9


def all_answers(names: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Every order of every set of names, none of them twice."""
    found = set()
    for count in range(1, len(names) + 1):
        for chosen in itertools.permutations(names, count):
            ids = [token for name in chosen for token in (BAR, *name)]
            found.add((*ids[1:], END))
    return found


def written(names: list[tuple[int, ...]], prefix: tuple[int, ...] = ()) -> set[tuple[int, ...]]:
    answer = ClosedAnswer(names, [BAR], END)
    for token in prefix:
        answer.push(token)
    allowed = answer.allowed()
    return set().union(*(written(names, (*prefix, token)) for token in allowed)) if allowed else {prefix}


def test_all_answers_and_no_others_can_be_written():
    # one name begins as another, one is the whole beginning of another
    for names in ([(1,)], [(1, 2), (1, 3)], [(1,), (1, 2), (3,)], [(1, 2, 3), (2,), (1, 2)]):
        assert written(names) == all_answers(names)
    assert written([(1, 2), (1, 2), (3,)]) == all_answers([(1, 2), (3,)])  # a name twice is one name


def test_a_separator_of_two_tokens():
    answer = ClosedAnswer([(1,), (2,)], [7, 8], END)
    answer.push(2)
    assert set(answer.allowed()) == {7, END}
    answer.push(7)
    assert answer.allowed() == [8]
    answer.push(8)
    assert answer.allowed() == [1]


def test_the_likeliest_of_those_allowed():
    logits = torch.tensor([[0.0, 1, 2, 3, 9], [0.0, 1, 2, 3, 9], [5.0, 1, 2, 3, 4]])
    assert likeliest(logits, None) == [4, 4, 0]
    answers = [ClosedAnswer([(1, 2), (3,)], [0], 4), ClosedAnswer([(2,)], [0], 4), ClosedAnswer([], [0], 4)]
    assert likeliest(logits, answers) == [3, 2, 0]  # without a name anything may be said
    assert answers[0].allowed() == [0, 4] and answers[1].allowed() == [4]
