"""How answers and rankings are scored: a function takes one question, a data set's figure is the mean over questions.

Answers follow the official SQuAD scripts: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250) for exact match and
F1, Rajpurkar et al. 2018 (https://arxiv.org/abs/1806.03822) for questions without an answer. An answer counts when it
equals a reference after normalisation; one that merely contains it does not.

Rankings follow trec_eval: recall, reciprocal rank (Voorhees 1999, TREC-8), and nDCG (Jarvelin and Kekalainen 2002, ACM
TOIS 20(4)) with the grade itself as the gain. A document that is listed twice keeps both places and counts once.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ABSTENTION = "The documents do not say."
"""What a model is taught to answer where the documents hold no answer."""

_CITATION = re.compile(r"\s*\[(\d{1,9})\]")
_QUOTE = re.compile(r"“([^”]*)”(.*)", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the words a, an, the; single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def split_citations(answer: str) -> tuple[str, list[int]]:
    """An answer without its citations, and the document numbers they name: "[2] 1904 [2][3]" -> ("1904", [2, 3])."""
    numbers = dict.fromkeys(int(number) for number in _CITATION.findall(answer))
    return _CITATION.sub("", answer).strip(), list(numbers)


def split_quote(text: str) -> tuple[str, str]:
    """An answer without its citations, and the quotation that it begins with: "“Born in 1904.” 1904" -> ("1904", "Born
    in 1904."). A quotation alone is the answer."""
    match = _QUOTE.match(text)
    return (match[2].strip() or match[1], match[1]) if match else (text, "")


def abstains(answer: str) -> bool:
    return normalize_answer(split_citations(answer)[0]) == normalize_answer(ABSTENTION)


def stated_answer(answer: str) -> str:
    """What an answer claims: without its citations and the quotation before it, and nothing where it abstains, as
    exact_match and f1 want it."""
    return "" if abstains(answer) else split_quote(split_citations(answer)[0])[0]


def abstention_scores(abstained: Sequence[bool], answerable: Sequence[bool]) -> dict[str, float]:
    """abstention_precision: of the answers that abstain, the share that was right to (0 if none does);
    abstention_recall: of the questions without an answer, the share that is abstained from; false_refusal: of those
    with one. A figure whose questions do not occur is left out."""
    pairs = list(zip(abstained, answerable, strict=True))
    without = [said_nothing for said_nothing, has_answer in pairs if not has_answer]
    with_one = [said_nothing for said_nothing, has_answer in pairs if has_answer]
    scores = {}
    if without:
        scores["abstention_precision"] = sum(without) / max(1, sum(abstained))
        scores["abstention_recall"] = sum(without) / len(without)
    if with_one:
        scores["false_refusal"] = sum(with_one) / len(with_one)
    return scores


def search_decisions(searched: Sequence[bool], needed: Sequence[bool]) -> dict[str, float]:
    """search_precision: of the questions that were searched for, the share that needed it (0 if none was);
    search_recall: of those that need it, the share that was searched for; needless_searches: of those that do not. A
    figure whose questions do not occur is left out."""
    pairs = list(zip(searched, needed, strict=True))
    with_need = [did for did, need in pairs if need]
    without = [did for did, need in pairs if not need]
    scores = {}
    if with_need:
        scores["search_precision"] = sum(with_need) / max(1, sum(searched))
        scores["search_recall"] = sum(with_need) / len(with_need)
    if without:
        scores["needless_searches"] = sum(without) / len(without)
    return scores


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the normalised prediction equals one of the normalised answers, else 0.

    No answers (or only ones of which normalisation leaves nothing) means that there is none: then 1 for saying nothing.
    """
    predicted = normalize_answer(prediction)
    return float(any(predicted == reference for reference in _references(answers)))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Harmonic mean of word precision and recall, words counted as often as they occur; the best over the answers.

    With no answers, 1 for saying nothing and 0 for any word, as in exact_match.
    """
    predicted = normalize_answer(prediction).split()
    return max(_f1(predicted, reference.split()) for reference in _references(answers))


def _references(answers: Iterable[str]) -> list[str]:
    return [reference for reference in map(normalize_answer, answers) if reference] or [""]


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = (Counter(predicted) & Counter(reference)).total()
    return 2 * common / (len(predicted) + len(reference))


def recall_at_k(retrieved: Sequence[str], gold: Iterable[str], k: int) -> float:
    """Share of the gold documents that are among the first k retrieved."""
    gold = _gold(gold)
    return len(gold.keys() & set(retrieved[:k])) / len(gold)


def citation_scores(cited: Sequence[Sequence[str]], golds: Sequence[Iterable[str]]) -> tuple[float, float]:
    """Precision: of all citations, the share that names a gold document (0 if there is none). Recall: the share of its
    gold documents that an answer cites, mean over the answers. cited: for each answer, the ids it names."""
    sets = [set(gold) for gold in golds]
    right = [len(set(ids) & gold) for ids, gold in zip(cited, sets, strict=True)]
    total = sum(len(set(ids)) for ids in cited)
    recall = sum(n / len(gold) for n, gold in zip(right, sets, strict=True)) / len(sets)
    return sum(right) / max(1, total), recall


def reciprocal_rank(retrieved: Sequence[str], gold: Iterable[str], k: int | None = None) -> float:
    """1 / rank of the first gold document among the first k (all, if k is not given), 0 if there is none."""
    gold = _gold(gold)
    return next((1 / rank for rank, id in enumerate(retrieved[:k], 1) if id in gold), 0.0)


def mrr(rankings: Sequence[Sequence[str]], golds: Sequence[Iterable[str]], k: int | None = None) -> float:
    """Mean reciprocal rank: the mean of reciprocal_rank over the questions."""
    ranks = [reciprocal_rank(retrieved, gold, k) for retrieved, gold in zip(rankings, golds, strict=True)]
    return sum(ranks) / len(ranks)


def ndcg_at_k(retrieved: Sequence[str], gold: Iterable[str] | Mapping[str, float], k: int) -> float:
    """Sum of grade / log2(rank + 1) over the first k, divided by that of the best possible order.

    gold maps ids to grades; without grades (a list or set of ids) each gold document has grade 1.
    """
    grades = _gold(gold)
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades.values(), reverse=True)[:k], 1))
    gained, seen = 0.0, set()
    for rank, id in enumerate(retrieved[:k], 1):
        if id in grades and id not in seen:
            gained += grades[id] / math.log2(rank + 1)
        seen.add(id)
    return gained / ideal


def _gold(gold: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    grades = dict(gold) if isinstance(gold, Mapping) else dict.fromkeys(gold, 1.0)
    grades = {id: grade for id, grade in grades.items() if grade > 0}
    if not grades:
        raise ValueError("a question without gold documents has no ranking score: leave it out of the mean")
    return grades
