"""Metrics against values computed by hand and against slow, literal versions of their definitions."""

from __future__ import annotations

import math
import random
import re
import string

import pytest

from nanochat.metrics import (
    ABSTENTION,
    abstains,
    abstention_scores,
    citation_scores,
    exact_match,
    f1,
    mrr,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
    reciprocal_rank,
    search_decisions,
    split_citations,
    stated_answer,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, a dog and\tAN owl!", "cat dog and owl"),
        ("U.S.A.", "usa"),
        ("theatre another", "theatre another"),  # articles are whole words
        ("a-b", "ab"),
        ("the", ""),
        ("1,234.5", "12345"),
        ("Zürich’s", "zürich’s"),  # only ASCII punctuation, as in the official script
        ("", ""),
    ],
)
def test_normalisation_is_that_of_squad(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1_value"),
    [
        ("Paris", ["paris"], 1, 1),
        ("the Paris.", ["London", "Paris"], 1, 1),
        ("Paris in France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # containing is not matching
        ("Par", ["Paris"], 0, 0),
        ("old old town", ["old town hall"], 0, 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)),  # "old" counts once
        ("new york", ["york city", "new york city"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # the best answer counts
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", ["the"], 1, 1),  # an answer of which nothing is left is no answer
        ("the", ["the", "cat"], 0, 0),  # and is left out beside a real one
    ],
)
def test_answers_by_hand(prediction: str, answers: list[str], em: float, f1_value: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(f1_value)


def slow_f1(prediction: str, answer: str) -> float:
    """Precision and recall by crossing off one word at a time."""

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return [word for word in re.split(r"\s+", text) if word not in ("", "a", "an", "the")]

    predicted, left, common = words(prediction), words(answer), 0
    if not predicted or not left:
        return float(predicted == left)
    wanted = len(left)
    for word in predicted:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / wanted
    return 2 * precision * recall / (precision + recall)


def test_f1_against_a_slow_reference() -> None:
    rng = random.Random(0)
    vocabulary = ["the", "a", "Red", "red,", "house", "on", "hill", "."]
    for _ in range(500):
        prediction, answer = (" ".join(rng.choices(vocabulary, k=rng.randint(0, 6))) for _ in range(2))
        assert f1(prediction, [answer]) == pytest.approx(slow_f1(prediction, answer))
        assert exact_match(prediction, [answer]) <= f1(prediction, [answer])
        assert f1(prediction, [answer, "red house"]) >= f1(prediction, ["red house"]) or not normalize_answer(answer)


def test_rankings_by_hand() -> None:
    retrieved = ["a", "b", "c", "d"]
    assert [recall_at_k(retrieved, ["b", "d", "z"], k) for k in (1, 2, 4, 9)] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert reciprocal_rank(retrieved, ["d", "b"]) == 1 / 2
    assert reciprocal_rank(retrieved, ["d"], k=3) == 0
    assert mrr([retrieved, retrieved, retrieved], [["a"], ["c"], ["z"]]) == pytest.approx((1 + 1 / 3 + 0) / 3)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at_k(retrieved, ["b", "d"], 10) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert ndcg_at_k(retrieved, ["a", "b"], 10) == 1
    assert ndcg_at_k(retrieved, ["a", "b", "z"], 2) == 1  # two places can hold no more
    graded = {"a": 1, "c": 2, "d": 0}
    assert ndcg_at_k(retrieved, graded, 4) == pytest.approx((1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3)))


def test_a_document_listed_twice_counts_once() -> None:
    assert recall_at_k(["a", "a"], ["a", "b"], 2) == 1 / 2
    assert ndcg_at_k(["a", "a"], ["a", "b"], 2) < ndcg_at_k(["a", "b"], ["a", "b"], 2) == 1
    assert ndcg_at_k(["a", "a"], ["a"], 2) == 1


def test_rankings_against_slow_references() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [str(i) for i in range(8)]
        retrieved = rng.sample(ids, rng.randint(0, 8))
        gold = {id: rng.randint(1, 3) for id in rng.sample(ids, rng.randint(1, 8))}
        k = rng.randint(1, 9)
        hits = [id for id in gold if id in retrieved and retrieved.index(id) < k]
        assert recall_at_k(retrieved, list(gold), k) == pytest.approx(len(hits) / len(gold))
        first = min((retrieved.index(id) + 1 for id in hits), default=math.inf)
        assert reciprocal_rank(retrieved, list(gold), k) == pytest.approx(1 / first)

        def dcg(order: list[str], grades: dict[str, int] = gold, k: int = k) -> float:
            return sum(grades.get(id, 0) * math.log(2) / math.log(place + 2) for place, id in enumerate(order[:k]))

        best = sorted(ids, key=lambda id, grades=gold: -grades.get(id, 0))
        assert ndcg_at_k(retrieved, gold, k) == pytest.approx(dcg(retrieved) / dcg(best))


def test_no_gold_documents_is_an_error_and_not_a_zero() -> None:
    for score in (recall_at_k, ndcg_at_k):
        with pytest.raises(ValueError, match="without gold"):
            score(["a"], [], 5)


@pytest.mark.parametrize(
    ("answer", "text", "numbers"),
    [
        ("[2] 1904", "1904", [2]),
        ("1904 [2][3]", "1904", [2, 3]),
        ("[12] [3] in the north [3].", "in the north.", [12, 3]),
        ("no source", "no source", []),
        ("a [list] of [ 2 ] things []", "a [list] of [ 2 ] things []", []),
        ("[99999999999999999999] x", "[99999999999999999999] x", []),
        ("", "", []),
    ],
)
def test_citations_are_read_from_an_answer(answer: str, text: str, numbers: list[int]) -> None:
    assert split_citations(answer) == (text, numbers)


def test_citation_scores_by_hand() -> None:
    golds = [["a"], ["b"], ["c", "d"], ["e"]]
    cited = [["a"], ["x"], ["d", "y"], []]
    precision, recall = citation_scores(cited, golds)
    assert precision == pytest.approx(2 / 4)  # a and d of a, x, d, y
    assert recall == pytest.approx((1 + 0 + 1 / 2 + 0) / 4)
    assert citation_scores([[], []], [["a"], ["b"]]) == (0, 0)
    assert citation_scores([["a", "a"]], [["a"]]) == (1, 1)


def test_abstaining_is_saying_nothing() -> None:
    assert abstains(ABSTENTION) and abstains("[3] the documents do not say") and stated_answer(ABSTENTION) == ""
    assert not abstains("") and not abstains("The documents do not say who.") and stated_answer("[1] 1904") == "1904"
    assert stated_answer("[2] “He was born in 1904.” 1904 [2]") == "1904" and stated_answer("[1] “1904”") == "1904"
    assert stated_answer("“a” and “b”") == "and “b”" and stated_answer("the “b”") == "the “b”"
    assert exact_match(stated_answer(ABSTENTION), []) == 1 and exact_match(stated_answer(ABSTENTION), ["x"]) == 0


def test_abstention_scores_by_hand() -> None:
    scores = abstention_scores([True, True, False, True, False], [False, False, False, True, True])
    assert scores == {"abstention_precision": 2 / 3, "abstention_recall": 2 / 3, "false_refusal": 1 / 2}
    assert abstention_scores([False], [False]) == {"abstention_precision": 0, "abstention_recall": 0}
    assert abstention_scores([False, True], [True, True]) == {"false_refusal": 0.5}


def test_search_decisions_by_hand() -> None:
    scores = search_decisions([True, True, False, True, False], [True, True, True, False, False])
    assert scores == {"search_precision": 2 / 3, "search_recall": 2 / 3, "needless_searches": 1 / 2}
    assert search_decisions([False], [True]) == {"search_precision": 0, "search_recall": 0}
    assert search_decisions([True, False], [False, False]) == {"needless_searches": 0.5}
