"""Answer the same questions closed book, from retrieved documents, from the gold documents, by searching (always, or
where the model decides to), and from the facts of a graph, and compare.

    python -m scripts.rag_eval --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/test.jsonl
    python -m scripts.rag_eval --systems closed,simple,bm25,gold,bm25:rag/other --positions 200 --knowledge_base ... \
        --queries ...
    python -m scripts.rag_eval --compare eval/one,eval/other
    python -m scripts.rag_eval --systems rag,refrag:refrag,refrag:refrag_rl --knowledge_base ... --queries ...
    python -m scripts.rag_eval --systems agent --knowledge_base ... --queries ...
    python -m scripts.rag_eval --systems drag --graph data/kg --queries data/rag_examples/queries/multihop_test.jsonl

Every figure comes with the interval that it can be trusted in (tasks/rag_figures.py says what each is). It writes a
table, the same as JSON (with --json also as its last line), plots, and a report with the answers that were wrong.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint, load_model, newest
from nanochat.common import UserError, atomic_write_text, compute_init, print0, run_main
from nanochat.config import config_to_dict, format_config, load_config
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.training import ranking_figures
from nanochat.engine import Engine
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import Document, read_queries, write_jsonl
from nanochat.searching import Searching
from tasks import rag_report, rag_systems
from tasks.rag_figures import Answered, Figure, figures, parts
from tasks.rag_report import Result
from tasks.rag_systems import FIND, Answering, More, found_by_index, sample

RETRIEVERS = ("simple", "bm25", "dense", "hybrid")
SYSTEMS = ("closed", "rag", *RETRIEVERS, "gold", "refrag", "agent", "dsi", "joint", "drag")
ANSWERABLE = ("closed", "gold")  # have nothing to refuse by: they are asked the questions that have an answer
SEARCHING = ("refrag", "agent")  # by themselves
INDEXES = ("dsi", "joint")  # a search index finds the documents


@dataclass(kw_only=True)
class Config:
    """Evaluate a model's answers with and without documents."""

    queries: list[Path] = field(default_factory=list)
    """Files of questions with answers and gold documents (queries/test.jsonl), separated by commas. Questions that the
    knowledge base holds no answer to are asked too, but not closed book and not of gold documents."""
    knowledge_base: Path | None = None
    """Directory of the knowledge base; drag needs none."""
    graph: Path | None = None
    """drag: folder of the graph."""
    source: str = "rag"
    """Checkpoint to evaluate: rag, mid or base."""
    model_tag: str = ""
    """Name of the model's checkpoint folder; by default the newest."""
    retriever_type: str = ""
    """simple, bm25, dense, hybrid or kg; by default the one the base was built with."""
    top_k: int = 5
    """Documents retrieved for a question."""
    systems: list[str] = field(default_factory=lambda: ["closed", "rag", "gold"])
    """closed: no documents; rag: the retrieved ones; simple, bm25, dense, hybrid: those that this retriever finds in
    the base; gold: the gold ones only; refrag: the model searches; agent: it does where it decides to, and how good its
    decisions are; dsi: as rag, with what the newest search index finds; joint: with an index that learned from answers,
    and its model; drag: facts of a graph. Separated by commas; with another checkpoint's source after a colon,
    refrag:refrag_rl, and its tag where it has another, agent:agent/cheap."""
    top_k_per_hop: int | None = None
    """refrag, agent: documents shown after a search; by default what the model was trained with."""
    max_hops: int | None = None
    """refrag, agent: searches in one answer, at most; likewise. 0: none, whatever the model decides."""
    min_hops: int = 0
    """refrag, agent: searches in one answer, at least: 1 for an agent that always searches."""
    search_threshold: float | None = None
    """refrag, agent: search where the model gives it at least this probability; by default as it writes."""
    refusal_threshold: float | None = None
    """Refuse where the model gives that at least this probability; by default as it writes."""
    num_questions: int = -1
    """A fixed random sample of this many questions; -1: all."""
    seed: int = 0
    """Seed of that sample."""
    positions: int = 0
    """Ask so many questions with their gold document in each place, to see whether the place matters."""
    by_top_k: list[int] = field(default_factory=list)
    """Also show so many documents, 1,3,10, and see what that does to EM."""
    latency: int = 16
    """Questions asked one at a time, for the time to the first token; 0: none."""
    compare: list[Path] = field(default_factory=list)
    """Nothing is asked: the differences between the systems of one run (its output folder) or of two."""
    max_tokens: int = 32
    """Longest answer in tokens; of a model that searches, whose queries count too, at least 128."""
    max_doc_length: int = 500
    """Longest document in tokens; the rest is cut."""
    batch_size: int = 32
    """Questions answered at a time."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto, float32 or bfloat16."""
    output: Path | None = None
    """Directory for results.json, table.md, report.md with its plots, and the predictions; by default beside the
    queries, eval/<source>-<tag>."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def with_tag(source: str, config: Config) -> tuple[str, str]:
    """Source and tag of "agent/cheap"; the tag is --model_tag where it has none."""
    of, _, tag = source.partition("/")
    return of, tag or config.model_tag


def ask(config: Config) -> list[dict[str, Any]]:
    """The questions that can be asked."""
    queries = [query for path in config.queries for query in read_queries(path)]
    if all(system.partition(":")[0] in (*ANSWERABLE, "drag") for system in config.systems):
        queries = [query for query in queries if query["answers"]]
    if not queries:
        raise UserError(f"{', '.join(map(str, config.queries))}: no question has an answer to compare with")
    return sample(queries, config.num_questions, config.seed)


class Evaluation:
    """One model after the other is loaded, and asked the questions."""

    def __init__(self, config: Config, queries: list[dict[str, Any]], manager: RetrievalManager | None):
        self.config, self.queries, self.manager = config, queries, manager
        self.device = compute_init(config.device, config.seed).device
        self.loaded: dict[str, Answering] = {}
        self.checkpoints: dict[str, str] = {}

    def run(self, system: str) -> Result:
        kind, _, source = system.partition(":")
        if kind == "drag":
            return self._graph(source or kind)
        index, folder = None, None
        if kind in INDEXES:
            folder = newest(checkpoint_root(kind, find_model_tag(kind)))
            index = SearchIndex.load(folder, self.device)
            self.checkpoints[f"{kind} index"] = str(folder)
        answering = self._load(source or (kind if kind in ("agent", "joint") else self.config.source), folder)
        queries = [q for q in self.queries if q["answers"]] if kind in ANSWERABLE else self.queries
        if kind in SEARCHING:
            rows, more = rag_systems.by_searching(
                queries, self.manager, self._searching(answering.meta), answering, kind == "agent"
            )
            return self._result(rows, more)
        return self._documents(kind, queries, index, answering)

    def _documents(self, kind: str, queries: list[dict], index: SearchIndex | None, answering: Answering) -> Result:
        """Systems that are shown documents before they answer, or none."""
        config, manager = self.config, self.manager
        most = max([config.top_k, FIND, *config.by_top_k])
        if kind in RETRIEVERS:
            manager = RetrievalManager(kind, config.knowledge_base)
        began = time.perf_counter()
        ranked: list[list[Document]] | None = None
        if kind == "closed":
            shown: list[list[Document]] = [[] for _ in queries]
        elif kind == "gold":
            if missing := manager.unknown(i for q in queries for i in q["doc_ids"]):
                raise UserError(
                    f"gold document {missing[0]!r} is not in the knowledge base: build it from the queries' documents"
                )
            shown = [manager.documents(q["doc_ids"]) for q in queries]
        else:
            if index is not None:
                ranked = [manager.documents(ids) for ids in found_by_index(index, queries, manager, most)]
            else:
                ranked = manager.search([q["query"] for q in queries], most)
            shown = [documents[: config.top_k] for documents in ranked]
        searched = time.perf_counter() - began
        found = None if ranked is None else [[document.id for document in one] for one in ranked]
        rows, more = rag_systems.from_documents(queries, shown, found, answering)
        if ranked is not None:
            more["search_seconds_per_question"] = searched / len(queries)
        if index is not None:
            more |= self._ranking_beside_bm25(index)
        if config.latency:
            more |= rag_systems.first_token(queries[: config.latency], shown[: config.latency], answering)
        place: dict[int, float] = {}
        if ranked is not None and config.positions:
            some = sample(queries, config.positions, config.seed)
            spread, place = rag_systems.by_position(some, manager, config.top_k, answering)
            more |= spread
        result = self._result(rows, more)
        result.place = place
        for count in config.by_top_k if ranked is not None else []:
            some, _ = rag_systems.from_documents(queries, [one[:count] for one in ranked], None, answering)
            result.count[count] = sum(parts(row)["em"][0] for row in some) / len(some)
        return result

    def _result(self, rows: list[Answered], more: More, texts: list[str] | None = None) -> Result:
        each = [parts(row) for row in rows]
        found = figures(each, self.config.seed) | {k: v for k, v in more.items() if isinstance(v, Figure)}
        return Result(rows, each, found, {k: v for k, v in more.items() if k not in found}, texts=texts or [])

    def _graph(self, source: str) -> Result:
        if self.config.graph is None:
            raise UserError("drag reads a graph: give --graph FOLDER (scripts.kg_prepare build makes one)")
        queries = [query for query in self.queries if query["answers"]]
        of, tag = with_tag(source, self.config)
        rows, more, texts, meta = rag_systems.from_graph(queries, self.config.graph, of, tag, self.device)
        self.checkpoints[source] = meta["directory"]
        return self._result(rows, more, texts)

    def _load(self, source: str, folder: Path | None) -> Answering:
        if source not in self.loaded:
            if source == "joint":
                model, tokenizer, meta, _ = load_checkpoint(folder / "reader", None, self.device)
                model.eval()
            else:
                of, tag = with_tag(source, self.config)
                model, tokenizer, meta = load_model(of, self.device, "eval", tag)
            config = self.config
            self.loaded[source] = Answering(
                Engine(model, tokenizer),
                meta,
                config.max_tokens,
                config.max_doc_length,
                config.batch_size,
                config.dtype,
                config.refusal_threshold,
            )
            self.checkpoints[source] = meta["directory"]
        return self.loaded[source]

    def _searching(self, meta: dict[str, Any]) -> Searching:
        config = self.config
        return Searching(
            self.manager.search,
            config.top_k_per_hop or meta.get("top_k_per_hop", 3),
            meta.get("max_hops", 3) if config.max_hops is None else config.max_hops,
            min_hops=config.min_hops,
            threshold=config.search_threshold,
            max_doc_tokens=config.max_doc_length,
            max_context=meta["training_config"]["max_seq_len"],
        )

    def _ranking_beside_bm25(self, index: SearchIndex) -> dict[str, float]:
        """hits1, hits10 and mrr of the index, and of BM25 over the same base."""
        asked = [query for query in self.queries if query["doc_ids"]]
        if not asked:
            return {}
        bm25 = RetrievalManager("bm25", self.config.knowledge_base).search([query["query"] for query in asked], 10)
        found = ranking_figures(found_by_index(index, asked, self.manager, 10), asked)
        of_bm25 = ranking_figures([[document.id for document in ranked] for ranked in bm25], asked)
        for name, one in (("index", found), ("bm25", of_bm25)):
            print0(f"{name:6} " + ", ".join(f"{key} {value:.3f}" for key, value in one.items()))
        return found | {f"bm25_{key}": value for key, value in of_bm25.items()}


def main() -> None:
    config = load_config(Config)
    if config.compare:
        if len(config.compare) > 2:
            raise UserError("--compare takes one run or two")
        print0(rag_report.compare_runs(config.compare))
        return
    print0(format_config(config))
    if unknown := [s for s in config.systems if s.partition(":")[0] not in SYSTEMS]:
        raise UserError(f"unknown system {unknown[0]!r}: there are {', '.join(SYSTEMS)}")
    if not config.queries:
        raise UserError("--queries is required: files of questions with answers (or --compare two runs)")
    queries = ask(config)
    systems = config.systems
    if not any(query["doc_ids"] for query in queries):  # questions about a graph come with answers alone
        print0("no question names its gold documents: gold is left out, and recall and citations do not apply")
        systems = [system for system in systems if system.partition(":")[0] != "gold"]
        if not systems:
            raise UserError("no question names its gold documents, which --systems gold needs")
    manager = None
    if any(system.partition(":")[0] != "drag" for system in systems):
        if config.knowledge_base is None:
            raise UserError("give --knowledge_base DIRECTORY: all systems but drag search one")
        manager = RetrievalManager(config.retriever_type or None, config.knowledge_base)
    evaluation = Evaluation(config, queries, manager)
    results: dict[str, Result] = {}
    for system in systems:
        results[system] = evaluation.run(system)
        print0(f"{system}: EM {results[system]['em']:.3f}, F1 {results[system]['f1']:.3f}")
    write(config, results, len(queries), evaluation.checkpoints, manager.retriever_type if manager else "")


def write(config: Config, results: dict[str, Result], n: int, checkpoints: dict[str, str], retriever: str) -> None:
    tag = Path(list(checkpoints.values())[-1]).parent.name
    name = "-".join(checkpoints).replace("/", "_")
    output = config.output or config.queries[0].parent / "eval" / f"{name}-{tag}"
    table = rag_report.format_table(results, n, config.top_k, retriever)
    print0("\n" + table)
    values: dict[str, float] = {"n": n}
    for system, result in results.items():
        flat = result.flat()
        values |= {f"{system}_{key}": value for key, value in flat.items()}
        if system.startswith("rag"):  # what the base finds
            values |= {key: value for key, value in flat.items() if key.startswith("recall")}
    settings = config_to_dict(config)
    report = {"figures": values, "config": settings, "checkpoints": checkpoints}
    atomic_write_text(output / "results.json", json.dumps(report, indent=2))
    atomic_write_text(output / "table.md", table + "\n")
    write_jsonl(output / "predictions.jsonl", rag_report.predictions(results))
    names = {system: rag_report.label(system, config.top_k, retriever) for system in results}
    pictures = rag_report.write_plots(results, names, output)
    rag_report.write_report(output, table, results, names, pictures, settings | checkpoints)
    print0(f"\nwrote {output}/report.md with its plots, table.md, results.json and predictions.jsonl")
    if config.json:
        print0(json.dumps({"figures": values}))


if __name__ == "__main__":
    run_main(main)
