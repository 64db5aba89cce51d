"""What scripts.rag_eval writes: a table, plots, a report that can be read without the code, and comparisons of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write_text
from nanochat.metrics import exact_match, stated_answer
from nanochat.report import plot_bars, plot_lines, plot_searches
from nanochat.retrieval.document import iter_jsonl
from tasks.rag_figures import RANKS, Answered, Difference, Figure, Parts, compare

SHOWN = (
    "em",
    "f1",
    "citation_precision",
    "citation_recall",
    "abstention_precision",
    "abstention_recall",
    "hallucination",
)
WRONG = 5  # answers shown of each system


@dataclass
class Result:
    """What came of a system. figures: with their intervals; more: those without one."""

    rows: list[Answered]
    parts: list[Parts]
    figures: dict[str, Figure]
    more: dict[str, float]
    place: dict[int, float] = field(default_factory=dict)  # EM by the gold document's place
    count: dict[int, float] = field(default_factory=dict)  # EM by the number of documents
    texts: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value if name in self.figures else self.more[name]

    def get(self, name: str) -> float | None:
        return self[name] if name in self.figures or name in self.more else None

    def flat(self) -> dict[str, float]:
        """All figures, and name_low, name_high."""
        values = {name: figure.value for name, figure in self.figures.items()} | self.more
        values |= {f"em_at_place_{n}": em for n, em in self.place.items()}
        values |= {f"em_of_{n}_documents": em for n, em in self.count.items()}
        for name, figure in self.figures.items():
            values |= {f"{name}_low": figure.low, f"{name}_high": figure.high}
        return values


def label(system: str, top_k: int, retriever: str) -> str:
    kind, _, source = system.partition(":")
    names = {
        "closed": "closed book",
        "rag": f"{retriever} top-{top_k}",
        "gold": "gold documents",
        "refrag": "searching",
        "agent": "deciding to search",
        "dsi": f"search index top-{top_k}",
        "joint": f"joint index top-{top_k}",
        "drag": "facts of a graph",
    }
    return names.get(kind, f"{kind} top-{top_k}") + (f" ({source})" if source else "")


# --- the table


def format_table(results: dict[str, Result], n: int, top_k: int, retriever: str) -> str:
    rows = list(results.values())
    asked_without = any(r.get("abstention_recall") is not None for r in rows)
    deciding = any(r.get("search_recall") is not None or r.get("needless_searches") is not None for r in rows)
    searching = any(r.get("searches") is not None for r in rows)
    lines = [
        f"| {n} questions | EM | F1 | recall@{top_k} | citation P / R | hallucination | prompt tokens | s / question |"
        + (" searches | documents |" if searching else "")
        + (" abstention P / R | false refusals |" if asked_without else "")
        + (" search P / R | needless |" if deciding else ""),
        "|---" * (8 + 2 * (searching + asked_without + deciding)) + "|",
    ]
    for system, r in results.items():
        recall = next((r.get(name) for name in (f"recall_at_{top_k}", "evidence") if r.get(name) is not None), None)
        seconds = r["seconds_per_question"] + r.more.get("search_seconds_per_question", 0)
        half = (r.figures["em"].high - r.figures["em"].low) / 2
        cells = [f"{r['em']:.3f} ± {half:.3f}", f"{r['f1']:.3f}", _cell(recall)]
        cells += [_pair(r, "citation_precision", "citation_recall"), _cell(r.get("hallucination"))]
        cells += [f"{r['prompt_tokens']:.0f}", f"{seconds:.3f}"]
        if searching:
            looks_up = system.partition(":")[0] not in ("closed", "gold", "drag")
            searches, documents = r.get("searches"), r.get("documents")
            cells.append(f"{float(looks_up) if searches is None else searches:.2f}")
            cells.append(f"{(top_k if looks_up else 0) if documents is None else documents:.2f}")
        if asked_without:
            cells += [_pair(r, "abstention_precision", "abstention_recall"), _cell(r.get("false_refusal"))]
        if deciding:
            cells += [_pair(r, "search_precision", "search_recall"), _cell(r.get("needless_searches"))]
        lines.append(f"| {label(system, top_k, retriever)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pair(result: Result, one: str, other: str) -> str:
    values = result.get(one), result.get(other)
    return "-" if values[1] is None else f"{_cell(values[0])} / {_cell(values[1])}"


# --- plots and the report


def write_plots(results: dict[str, Result], names: dict[str, str], output: Path) -> list[str]:
    """The names of the pictures written to output."""
    output.mkdir(parents=True, exist_ok=True)
    bars = {
        names[system]: {n: (f.value, f.low, f.high) for n in SHOWN if (f := r.figures.get(n))}
        for system, r in results.items()
    }
    plot_bars(bars, output / "figures.png", "with 95% intervals")
    written = ["figures.png"]
    ranks = {
        names[system]: {k: r[f"recall_at_{k}"] for k in RANKS}
        for system, r in results.items()
        if f"recall_at_{RANKS[0]}" in r.figures
    }
    for name, series, words in (
        ("recall.png", ranks, ("documents found", "rank", "recall")),
        ("place.png", {names[s]: r.place for s, r in results.items() if r.place},
         ("where the gold document stands", "place among the documents", "EM")),
        ("documents.png", {names[s]: r.count for s, r in results.items() if r.count},
         ("how many documents are shown", "documents", "EM")),
    ):  # fmt: skip
        if series:
            plot_lines(series, output / name, *words, logarithmic=name == "recall.png")
            written.append(name)
    searched: dict[str, dict[str, tuple[float, float]]] = {}
    for system, r in results.items():
        if "searches" in r.figures:
            kind, _, source = system.partition(":")
            searched.setdefault(kind, {})[source or kind] = r["searches"], r["em"]
    if sum(map(len, searched.values())) > 1:
        plot_searches(searched, output / "searches.png")
        written.append("searches.png")
    return written


READING = """\
EM: the answer is one of the right ones, word for word, after case, punctuation and articles are dropped; ± half of the
95% interval of resampled questions. F1: words in common. recall@{top_k}: share of the gold documents among those found.
Citations: of the documents cited, the share that are gold (P), and of the gold ones, the share that is cited (R).
Hallucination: share of the questions that are answered with something that is wrong and stands in no document shown.
Abstention: of the refusals, the share that is right (P), and of the questions without an answer, the share that is
refused (R); false refusals: of those with one."""


def write_report(
    output: Path,
    table: str,
    results: dict[str, Result],
    names: dict[str, str],
    pictures: list[str],
    settings: dict[str, Any],
) -> None:
    """names: of the systems, for people."""
    lines = ["# Answers from documents", "", table, "", READING.format(top_k=settings["top_k"]), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    for system, r in results.items():
        wrong = [row for row in r.rows if not exact_match(stated_answer(row.text), row.query["answers"])]
        lines += ["", f"## {names[system]}", ""]
        lines += ["| figure | value | 95% interval |", "|---|---|---|"]
        lines += [f"| {name} | {f.value:.3f} | {f.low:.3f} to {f.high:.3f} |" for name, f in r.figures.items()]
        lines += [f"| {name} | {value:.4g} | |" for name, value in r.more.items()]
        lines += [f"| em, gold document in place {place} | {em:.3f} | |" for place, em in r.place.items()]
        lines += [f"| em, {count} documents | {em:.3f} | |" for count, em in r.count.items()]
        if wrong:
            lines += ["", f"{len(wrong)} of {len(r.rows)} answers are wrong; the first:", ""]
        for row in wrong[:WRONG]:
            right = " or ".join(row.query["answers"]) or "(none: refuse)"
            shown = "; ".join(f"[{at}] {_plain(document.title)}" for at, document in enumerate(row.shown, 1))
            lines.append(
                f"- {_plain(row.query['query'])}  \n  right: {_plain(right)}; said: {_plain(row.text) or '(nothing)'}"
            )
            lines += [f"  \n  shown: {shown}"] if shown else []
    lines += ["", "## Settings", "", "```", *(f"{name} = {value!r}" for name, value in settings.items()), "```", ""]
    atomic_write_text(output / "report.md", "\n".join(lines))


def _plain(text: str) -> str:
    """A text on a line of Markdown, shortened, with nothing in it that Markdown or HTML would read."""
    text = " ".join(text.split())
    text = text if len(text) <= 160 else text[:157] + "..."
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, "\\" + sign)
    return text


# --- two runs


def read_scores(folder: Path) -> dict[str, dict[str, Parts]]:
    """system -> question id -> its parts, of a run's predictions.jsonl."""
    found: dict[str, dict[str, Parts]] = {}
    path = folder / "predictions.jsonl"
    for number, record in iter_jsonl(path):
        if not isinstance(record.get("scores"), dict):
            raise UserError(f"{path}:{number}: no scores; run scripts.rag_eval again, it writes them")
        for system, scores in record["scores"].items():
            parts = {name: (float(over), float(under)) for name, (over, under) in scores.items()}
            found.setdefault(system, {})[str(record["id"])] = parts
    if not found:
        raise UserError(f"{path}: nothing in it")
    return found


def compare_runs(folders: Sequence[Path]) -> str:
    """Tables of differences: one folder's systems with its first, or two folders' systems of the same names (where
    each has but one, those)."""
    runs = [read_scores(folder) for folder in folders]
    if len(runs) == 1:
        first, *others = runs[0]
        pairs = [((0, first), (0, other)) for other in others]
    else:
        same = [system for system in runs[0] if system in runs[1]]
        if not same and len(runs[0]) == len(runs[1]) == 1:
            pairs = [((0, next(iter(runs[0]))), (1, next(iter(runs[1]))))]
        else:
            pairs = [((0, system), (1, system)) for system in same]
    if not pairs:
        raise UserError("--compare: no two systems to compare; give two runs with systems of the same names")
    blocks = []
    for (a, one), (b, other) in pairs:
        both = [id for id in runs[a][one] if id in runs[b][other]]
        if not both:
            raise UserError("--compare: the runs have no question in common")
        found = compare([runs[a][one][id] for id in both], [runs[b][other][id] for id in both])
        titles = [f"{folders[x]}: {name}" if len(runs) > 1 else name for x, name in ((a, one), (b, other))]
        blocks.append(_difference_table(titles, len(both), found))
    return "\n\n".join(blocks)


def _difference_table(titles: list[str], n: int, found: dict[str, Difference]) -> str:
    lines = [f"| {n} questions | {titles[0]} | {titles[1]} | difference | 95% interval | questions more / less |"]
    lines.append("|---|---|---|---|---|---|")
    for name, d in found.items():
        sure = "" if d.low <= 0 <= d.high else " *"
        lines.append(
            f"| {name} | {d.before:.3f} | {d.after:.3f} | {d.after - d.before:+.3f}{sure} "
            f"| {d.low:+.3f} to {d.high:+.3f} | {d.more} / {d.less} |"
        )
    return "\n".join([*lines, "", "*: zero is not in the interval"])


def predictions(results: dict[str, Result]) -> list[dict[str, Any]]:
    """A line for each question: what each system said, and what it adds to each figure."""
    lines: dict[str, dict[str, Any]] = {}
    for system, r in results.items():
        texts = r.texts or [row.text for row in r.rows]
        for row, parts, text in zip(r.rows, r.parts, texts, strict=True):
            id = str(row.query["id"])
            line = lines.setdefault(
                id, {"id": id, "query": row.query["query"], "answers": row.query["answers"], "shown": {}, "scores": {}}
            )
            line[system] = text
            line["shown"][system] = [document.id for document in row.shown]
            line["scores"][system] = {name: list(both) for name, both in parts.items()}
    return list(lines.values())
