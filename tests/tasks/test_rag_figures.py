"""Figures of answers, held to the metrics that they are made of; intervals, comparisons, and what the report says."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nanochat import metrics
from nanochat.common import UserError
from nanochat.retrieval.document import Document, write_jsonl
from tasks import rag_report
from tasks.rag_figures import Answered, Figure, bootstrap, compare, figures, parts
from tasks.rag_report import Result


def documents(*contents: str) -> list[Document]:
    return [Document(f"d{n}", f"Title {n}", content) for n, content in enumerate(contents)]


def query(id: str, answers: list[str], gold: list[str]) -> dict:
    return {"id": id, "query": f"What is {id}?", "answers": answers, "doc_ids": gold}


SHOWN = documents("Born in 1904.", "Lives in Old Haven.", "Nothing.")
REFUSED = metrics.ABSTENTION
ROWS = [
    Answered(query("right", ["1904"], ["d0"]), "[1] 1904", SHOWN, ["d0", "d1"], ["d0"]),
    Answered(query("quoted", ["1904"], ["d0"]), "[1] “Born in 1904.” 1904", SHOWN, ["d2", "d0"], ["d0"]),
    Answered(query("misread", ["1904"], ["d0"]), "[2] Old Haven", SHOWN, ["d2", "d1"], ["d0"]),
    Answered(query("invented", ["1904"], ["d0"]), "[7] 1999 [2]", SHOWN, ["d1", "d2", "d0"], ["d0"]),
    Answered(query("longer", ["1904"], ["d0"]), "in 1904 or so", SHOWN, ["d0"], ["d0"]),
    Answered(query("refused", ["1904"], ["d0"]), REFUSED, SHOWN, ["d0"], ["d0"]),
    Answered(query("unanswerable", [], []), f"[1] {REFUSED}", SHOWN, ["d0"], []),
    Answered(query("trapped", [], []), "1904", SHOWN, ["d0"], []),
    Answered(query("silent", ["1904"], ["d0"]), "", SHOWN, ["d0"], ["d0"]),
]


def test_figures_are_those_of_the_metrics():
    found = {name: figure.value for name, figure in figures(list(map(parts, ROWS))).items()}
    stated = [metrics.stated_answer(row.text) for row in ROWS]
    answers = [row.query["answers"] for row in ROWS]
    expected = {
        "em": np.mean([metrics.exact_match(s, a) for s, a in zip(stated, answers, strict=True)]),
        "f1": np.mean([metrics.f1(s, a) for s, a in zip(stated, answers, strict=True)]),
        "contains": 3 / 7,  # right, quoted, longer
        "hallucination": 3 / 9,  # invented, longer, silent; misread and trapped are in a document
        **metrics.abstention_scores([metrics.abstains(row.text) for row in ROWS], [bool(a) for a in answers]),
    }
    ranked = [row for row in ROWS if row.query["doc_ids"]]
    golds = [row.query["doc_ids"] for row in ranked]
    for k in (1, 5, 10):
        recalls = [metrics.recall_at_k(row.found, gold, k) for row, gold in zip(ranked, golds, strict=True)]
        expected[f"recall_at_{k}"] = np.mean(recalls)
    expected["mrr"] = metrics.mrr([row.found for row in ranked], golds, 10)
    expected["ndcg10"] = np.mean([metrics.ndcg_at_k(r.found, g, 10) for r, g in zip(ranked, golds, strict=True)])
    cited = [["d0"], ["d0"], ["d1"], ["[7]", "d1"], [], [], []]
    expected["citation_precision"], expected["citation_recall"] = metrics.citation_scores(cited, golds)
    assert found == pytest.approx(expected)


def test_figures_that_do_not_apply_are_left_out():
    plain = figures([parts(Answered(query(str(n), ["x"], []), "x")) for n in range(3)])
    assert set(plain) == {"em", "f1", "contains", "hallucination"} and plain["em"].value == 1
    unread = [parts(Answered(query(str(n), ["x"], ["d0"]), "x", SHOWN, None, ["d0"])) for n in range(3)]
    assert not [name for name in figures(unread) if "citation" in name or "recall" in name]  # nothing is ever cited
    searched = figures([parts(Answered(query("a", ["x"], []), "x", more={"searches": 2.0}))])
    assert searched["searches"].value == 2


def test_an_interval_is_about_two_standard_errors_to_each_side():
    rng = random.Random(0)
    each = [parts(Answered(query(str(n), ["x"], []), "x" if rng.random() < 0.7 else "y")) for n in range(1000)]
    em = figures(each)["em"]
    error = (em.value * (1 - em.value) / 1000) ** 0.5
    assert em.low == pytest.approx(em.value - 1.96 * error, abs=0.006)
    assert em.high == pytest.approx(em.value + 1.96 * error, abs=0.006)
    assert figures(each)["em"] == em
    covered = 0
    for seed in range(200):  # of samples of 80 questions
        rng = random.Random(seed)
        some = [parts(Answered(query(str(n), ["x"], []), "x" if rng.random() < 0.7 else "y")) for n in range(80)]
        covered += figures(some)["em"].low <= 0.7 <= figures(some)["em"].high
    assert 175 <= covered <= 200


def test_two_systems_are_compared_question_by_question():
    rng = random.Random(1)
    hard = [rng.random() < 0.5 for _ in range(400)]

    def said(luck: float) -> list:
        return [
            parts(Answered(query(str(n), ["x"], []), "x" if not h or rng.random() < luck else "y"))
            for n, h in enumerate(hard)
        ]

    one, other = said(0.1), said(0.3)
    em = compare(one, other)["em"]
    pairs = [(a["em"][0], b["em"][0]) for a, b in zip(one, other, strict=True)]
    assert em.before == np.mean([a for a, _ in pairs]) and em.after == np.mean([b for _, b in pairs])
    assert (em.more, em.less) == (sum(b > a for a, b in pairs), sum(b < a for a, b in pairs))
    change = np.array([b - a for a, b in pairs])
    error = change.std() / 400**0.5
    assert em.low == pytest.approx(change.mean() - 1.96 * error, abs=0.01)
    assert em.high == pytest.approx(change.mean() + 1.96 * error, abs=0.01)
    same = compare(one, one)["em"]
    assert same.low == same.high == same.more == same.less == 0


def result(rows: list[Answered]) -> Result:
    each = list(map(parts, rows))
    more = {"seconds_per_question": 0.5, "prompt_tokens": 9.0, "search_seconds_per_question": 0.25}
    return Result(rows, each, figures(each), more, place={1: 0.5, 2: 0.25}, count={1: 0.5, 3: 0.4})


def test_table_report_and_pictures(tmp_path):
    hostile = Answered(query("<b>|x|</b>", ["*"], ["d0"]), "`<script>`\n# no", SHOWN, ["d0"], ["d0"])
    results = {"rag": result([hostile, *ROWS]), "refrag:refrag_rl": result(ROWS[:3])}
    table = rag_report.format_table(results, 10, 5, "bm25")
    lines = table.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and lines[2].startswith("| bm25 top-5 | 0.3")
    assert lines[3].startswith("| searching (refrag_rl) | 0.667 ±") and "| 0.750 |" in lines[2]
    names = {system: rag_report.label(system, 5, "bm25") for system in results}
    pictures = rag_report.write_plots(results, names, tmp_path)
    assert pictures == ["figures.png", "recall.png", "place.png", "documents.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    rag_report.write_report(tmp_path, table, results, names, pictures, {"top_k": 5})
    text = (tmp_path / "report.md").read_text()
    assert table in text and "7 of 10 answers are wrong" in text and "top_k = 5" in text
    assert "<script>" not in text and "\\<script\\>" in text and "\n# no" not in text
    assert results["rag"].flat()["em_at_place_2"] == 0.25 and "em_low" in results["rag"].flat()


def test_runs_are_compared_by_their_files(tmp_path):
    for name, systems in {
        "one": {"rag": result(ROWS), "closed": result(ROWS[:6])},
        "other": {"rag": result(ROWS[::-1])},
        "alone": {"simple": result(ROWS)},
    }.items():
        write_jsonl(tmp_path / name / "predictions.jsonl", rag_report.predictions(systems))
    within = rag_report.compare_runs([tmp_path / "one"])
    assert within.startswith("| 6 questions | rag | closed |")
    between = rag_report.compare_runs([tmp_path / "one", tmp_path / "other"])
    assert "| 9 questions |" in between and "| em | 0.333 | 0.333 | +0.000 | +0.000 to +0.000 | 0 / 0 |" in between
    assert "simple" in rag_report.compare_runs([tmp_path / "other", tmp_path / "alone"])
    with pytest.raises(UserError, match="no two systems"):
        rag_report.compare_runs([tmp_path / "one", tmp_path / "alone"])
    write_jsonl(tmp_path / "old/predictions.jsonl", [{"id": "1", "query": "?", "answers": [], "rag": "x"}])
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: no scores"):
        rag_report.compare_runs([tmp_path / "old"])
    with pytest.raises(UserError, match="cannot be read"):
        rag_report.compare_runs([tmp_path / "nowhere"])


def test_an_interval_of_a_statistic_that_is_no_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    median = bootstrap(values, np.median)
    assert median.value == np.median(values) and median.low < 5 < median.high
    # of a normal distribution the median's standard error is 1.2533 sigma / sqrt(n)
    assert (median.high - median.low) / 2 == pytest.approx(1.96 * 1.2533 * 2 / 20, rel=0.25)
    same = np.ones((50, 3))
    assert bootstrap(same, lambda rows: np.ptp(rows.mean(0))) == Figure(0, 0, 0)
