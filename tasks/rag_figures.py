"""What answers from documents are worth, each figure with the interval that it can be trusted in.

Every figure is a sum over the questions divided by another: EM is right answers by questions, citation precision right
citations by citations. `figures` resamples the questions (percentile bootstrap; Efron and Tibshirani 1993, chapter 13),
`compare` resamples the differences of two systems on the same questions.

    em, f1              as in SQuAD, of what is stated: without citations and quotation; abstaining is right where there
                        is no answer
    contains            the answer's words stand in what is stated. It flatters: a text that says everything has it all
    recall_at_K, mrr, ndcg10   of the documents found, over questions with gold documents
    citation_precision, citation_recall     of the documents cited
    abstention_precision, abstention_recall, false_refusal      see nanochat.metrics.abstention_scores
    hallucination       it stated something that is wrong and stands in no document that it was shown
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanochat.engine import Generation
from nanochat.metrics import (
    abstains,
    exact_match,
    f1,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
    reciprocal_rank,
    split_citations,
    stated_answer,
)
from nanochat.retrieval.document import Document

RANKS = (1, 5, 10)
RESAMPLES, LEVEL = 1000, 0.95
ABSTENTION_FIGURES = ("abstention_precision", "abstention_recall", "false_refusal")

Parts = dict[str, tuple[float, float]]
"""What one question adds to the two sums of each figure."""


@dataclass
class Answered:
    """A question as a system answered it. shown: documents it read, in the order of their numbers; found: ids that its
    search ranked, the best first, None where it does not rank; cite: ids of the documents to cite."""

    query: dict[str, Any]
    text: str
    shown: Sequence[Document] = ()
    found: Sequence[str] | None = None
    cite: Sequence[str] = ()
    more: dict[str, float] = field(default_factory=dict)  # figures of its own, to be averaged


def searched(query: dict[str, Any], text: str, info: Generation) -> Answered:
    """Where the model searched by itself: besides, how often, what that showed, and of the gold documents the share."""
    shown = [document for hop in info.hops for document in hop.documents]
    more = {"searches": len(info.hops), "documents": len(shown), "answered": info.finish_reason == "stop"}
    if gold := set(query["doc_ids"]):
        more["evidence"] = len(gold & {document.id for document in shown}) / len(gold)
    cite = (query.get("hops") or [query])[-1]["doc_ids"]  # the last hop's answer is what is stated
    return Answered(query, text, shown, None, cite, {name: float(value) for name, value in more.items()})


@dataclass
class Figure:
    value: float
    low: float
    high: float


def parts(one: Answered) -> Parts:
    """A figure that the question has no part in is left out."""
    answers, gold = one.query["answers"], list(one.query["doc_ids"])
    stated, silent = stated_answer(one.text), abstains(one.text)
    right = exact_match(stated, answers)
    words = f" {normalize_answer(stated)} "
    sums = {
        "em": (right, 1.0),
        "f1": (f1(stated, answers), 1.0),
        "abstention_precision": (float(silent and not answers), float(silent)),
        "hallucination": (float(not silent and not right and not _stands_in(words, one.shown)), 1.0),
    }
    if answers:
        sums["contains"] = (float(any(f" {normalize_answer(a)} " in words for a in answers)), 1.0)
        sums["false_refusal"] = (float(silent), 1.0)
    else:
        sums["abstention_recall"] = (float(silent), 1.0)
    if one.found is not None and gold:
        sums |= {f"recall_at_{k}": (recall_at_k(one.found, gold, k), 1.0) for k in RANKS}
        sums["mrr"] = (reciprocal_rank(one.found, gold, 10), 1.0)
        sums["ndcg10"] = (ndcg_at_k(one.found, gold, 10), 1.0)
    if one.shown and one.cite:
        ids = [document.id for document in one.shown]
        # a number beyond the documents shown is a citation too, of nothing
        cited = {ids[n - 1] if 0 < n <= len(ids) else f"[{n}]" for n in split_citations(one.text)[1]}
        hits = len(cited & set(one.cite))
        sums["citation_precision"] = (float(hits), float(len(cited)))
        sums["citation_recall"] = (hits / len(set(one.cite)), 1.0)
    return sums | {name: (value, 1.0) for name, value in one.more.items()}


def _stands_in(words: str, shown: Sequence[Document]) -> bool:
    return bool(words.strip()) and any(
        words in f" {normalize_answer(f'{document.title} {document.content}')} " for document in shown
    )


def figures(each: Sequence[Parts], seed: int = 0) -> dict[str, Figure]:
    """Of all questions. Abstention figures are left out where every question has an answer and none is refused,
    citation figures where nothing is ever cited."""
    sums = _sums(each)
    if "abstention_recall" not in sums and not sums["abstention_precision"][1].any():
        sums = {name: both for name, both in sums.items() if name not in ABSTENTION_FIGURES}
    if "citation_precision" in sums and not sums["citation_precision"][1].any():
        del sums["citation_precision"], sums["citation_recall"]
    weights = _weights(len(each), seed)
    return {name: _figure(over, under, weights) for name, (over, under) in sums.items()}


@dataclass
class Difference:
    """A figure of two systems on the same questions: after less before, and on how many questions it is more, less."""

    before: float
    after: float
    low: float
    high: float
    more: int
    less: int


def compare(one: Sequence[Parts], other: Sequence[Parts], seed: int = 0) -> dict[str, Difference]:
    """Figures that both have; one and other: of the same questions in the same order."""
    both = _sums(one), _sums(other)
    weights = _weights(len(one), seed)
    found = {}
    for name in both[0]:
        if name not in both[1] or not all(sums[name][1].any() for sums in both):
            continue
        (a, b), (c, d) = (_resampled(*sums[name], weights) for sums in both)
        before, after = (float(sums[name][0].sum() / sums[name][1].sum()) for sums in both)
        low, high = np.nanquantile(c / d - a / b, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        change = both[1][name][0] - both[0][name][0]
        found[name] = Difference(
            before, after, float(low), float(high), int((change > 0).sum()), int((change < 0).sum())
        )
    return found


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Figure:
    """A statistic of values (n, ...) that is no quotient of two sums, with its interval."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile([statistic(values[rows]) for rows in drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(float(statistic(values)), float(low), float(high))


def _sums(each: Sequence[Parts]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = dict.fromkeys(name for sums in each for name in sums)
    found = {}
    for name in names:
        pairs = np.array([sums.get(name, (0.0, 0.0)) for sums in each])
        found[name] = (pairs[:, 0], pairs[:, 1])
    return found


def _weights(n: int, seed: int) -> np.ndarray:
    """How often each question is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)


def _resampled(over: np.ndarray, under: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    below = weights @ under
    return weights @ over, np.where(below > 0, below, np.nan)


def _figure(over: np.ndarray, under: np.ndarray, weights: np.ndarray) -> Figure:
    if not under.any():
        return Figure(0.0, 0.0, 0.0)
    above, below = _resampled(over, under, weights)
    low, high = np.nanquantile(above / below, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(float(over.sum() / under.sum()), float(low), float(high))
