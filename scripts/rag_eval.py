"""Answer the same questions closed book, from retrieved documents, from the gold documents, by searching (always, or
where the model decides to), and from the facts of a graph, and compare.

    python -m scripts.rag_eval --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/test.jsonl
    python -m scripts.rag_eval --systems rag,refrag:refrag,refrag:refrag_rl --knowledge_base ... --queries ...
    python -m scripts.rag_eval --systems agent --knowledge_base ... --queries ...
    python -m scripts.rag_eval --systems drag --graph data/kg --queries data/rag_examples/queries/multihop_test.jsonl

EM and F1 as in SQuAD (nanochat/metrics.py), of the answer without its citations, which are scored apart. One table,
and the same as JSON beside it and, with --json, in the last line.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint, load_model, newest
from nanochat.common import UserError, atomic_write_text, compute_init, print0, run_main
from nanochat.config import config_to_dict, format_config, load_config
from nanochat.conversation import answer_text, render_prompt
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.training import ranking_figures
from nanochat.engine import Engine
from nanochat.kg.drag import load_drag
from nanochat.kg.drag_data import answer_all, ask, score_answers
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question
from nanochat.metrics import citation_scores, exact_match, f1, recall_at_k, split_citations
from nanochat.report import plot_searches
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries, write_jsonl
from nanochat.searching import Searching
from nanochat.training import autocast, resolve_dtype
from tasks.agent import oracle_decisions, policy_figures
from tasks.refrag import multi_hop_figures

SYSTEMS = ("closed", "rag", "gold", "refrag", "agent", "dsi", "joint", "drag")
SEARCHING = ("refrag", "agent")  # by themselves
INDEXES = ("dsi", "joint")  # a search index finds the documents


@dataclass(kw_only=True)
class Config:
    """Evaluate a model's answers with and without documents."""

    queries: list[Path]
    """Files of questions with answers and gold documents (queries/test.jsonl), separated by commas. Questions that the
    knowledge base holds no answer to are asked where every system searches by itself (refrag, agent), else left out."""
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
    """closed: no documents; rag: the retrieved ones; gold: the gold ones only; refrag: the model searches; agent: it
    does where it decides to, and how good its decisions are; dsi: as rag, with what the newest search index finds;
    joint: with an index that learned from answers, and its model; drag: facts of a graph. Separated by commas; with
    another checkpoint's source after a colon, refrag:refrag_rl, and its tag where it has another, agent:agent/cheap."""
    top_k_per_hop: int | None = None
    """refrag, agent: documents shown after a search; by default what the model was trained with."""
    max_hops: int | None = None
    """refrag, agent: searches in one answer, at most; likewise. 0: none, whatever the model decides."""
    min_hops: int = 0
    """refrag, agent: searches in one answer, at least: 1 for an agent that always searches."""
    search_threshold: float | None = None
    """refrag, agent: search where the model gives it at least this probability; by default as it writes."""
    num_questions: int = -1
    """A fixed random sample of this many questions; -1: all."""
    seed: int = 0
    """Seed of that sample."""
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
    """Directory for results.json, table.md, the predictions and, of systems that search by themselves, a plot of EM
    against searches; by default beside the queries, eval/<source>-<tag>."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def with_tag(source: str, config: Config) -> tuple[str, str]:
    """Source and tag of "agent/cheap"; the tag is --model_tag where it has none."""
    of, _, tag = source.partition("/")
    return of, tag or config.model_tag


def contexts(
    system: str, queries: list[dict], manager: RetrievalManager, top_k: int, index: SearchIndex | None = None
) -> list[list[Any]]:
    """The documents a system shows for each question."""
    if system == "closed":
        return [[] for _ in queries]
    if index is not None:
        return [manager.documents(ids[:top_k]) for ids in found_by_index(index, queries, manager, top_k)]
    if system == "rag":
        return manager.search([q["query"] for q in queries], top_k)
    if missing := manager.unknown(i for q in queries for i in q["doc_ids"]):
        raise UserError(
            f"gold document {missing[0]!r} is not in the knowledge base: build it from the queries' documents"
        )
    return [manager.documents(q["doc_ids"]) for q in queries]


def found_by_index(index: SearchIndex, queries: list[dict], manager: RetrievalManager, top_k: int) -> list[list[str]]:
    """Ids of the base's documents."""
    there = frozenset(index.ids.sequences) - frozenset(manager.unknown(index.ids.sequences))
    found = index.search([query["query"] for query in queries], top_k, there)
    return [[id for id, _ in ranked] for ranked in found]


def ranking_beside_bm25(
    index: SearchIndex, queries: list[dict], manager: RetrievalManager, base: Path
) -> dict[str, float]:
    """hits1, hits10 and mrr of the index, and of BM25 over the same base."""
    asked = [query for query in queries if query["doc_ids"]]
    if not asked:
        return {}
    bm25 = RetrievalManager("bm25", base).search([query["query"] for query in asked], 10)
    figures = ranking_figures(found_by_index(index, asked, manager, 10), asked)
    of_bm25 = ranking_figures([[document.id for document in ranked] for ranked in bm25], asked)
    for name, one in (("index", figures), ("bm25", of_bm25)):
        print0(f"{name:6} " + ", ".join(f"{key} {value:.3f}" for key, value in one.items()))
    return figures | {f"bm25_{key}": value for key, value in of_bm25.items()}


def evaluate_system(
    engine: Engine, queries: list[dict], documents: list[list[Any]], config: Config, max_prompt_tokens: int
) -> tuple[dict[str, float], list[str]]:
    """Mean EM and F1 (shares), seconds a question for generation, and the answers."""
    prompts = []
    for query, shown in zip(queries, documents, strict=True):
        messages: list[dict[str, Any]] = [{"role": "user", "content": query["query"]}]
        if shown:
            messages.insert(0, {"role": "retrieval", "documents": [d.to_dict() for d in shown]})
        prompts.append(
            render_prompt({"messages": messages}, engine.tokenizer, max_prompt_tokens, config.max_doc_length)
        )
    began = time.perf_counter()
    with autocast(engine.model.device, resolve_dtype(config.dtype, engine.model.device)):
        generated = engine.generate_batch(prompts, config.batch_size, max_tokens=config.max_tokens)
    seconds = time.perf_counter() - began
    answers = [answer_text(ids, engine.tokenizer) for ids in generated]
    said, cited = zip(*map(split_citations, answers), strict=True)
    scores = {
        "em": sum(exact_match(a, q["answers"]) for a, q in zip(said, queries, strict=True)) / len(queries),
        "f1": sum(f1(a, q["answers"]) for a, q in zip(said, queries, strict=True)) / len(queries),
        "seconds_per_question": seconds / len(queries),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
    }
    if any(documents) and any(cited):
        # a number beyond the documents shown is a citation too, of nothing
        named = [
            ([shown[n - 1].id if 0 < n <= len(shown) else f"[{n}]" for n in numbers], query["doc_ids"])
            for shown, numbers, query in zip(documents, cited, queries, strict=True)
            if query["doc_ids"]
        ]
        if named:
            scores["citation_precision"], scores["citation_recall"] = citation_scores(*zip(*named, strict=True))
    return scores, answers


def evaluate_searching(
    engine: Engine,
    queries: list[dict],
    manager: RetrievalManager,
    config: Config,
    meta: dict[str, Any],
    decides: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """The same where the model searches by itself, and how much it searched; prompt tokens are all that it read.
    decides: also how good its decisions to search are."""
    room = meta["training_config"]["max_seq_len"]
    searching = Searching(
        manager.search,
        config.top_k_per_hop or meta.get("top_k_per_hop", 3),
        meta.get("max_hops", 3) if config.max_hops is None else config.max_hops,
        min_hops=config.min_hops,
        threshold=config.search_threshold,
        max_doc_tokens=config.max_doc_length,
        max_context=room,
    )
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    began = time.perf_counter()
    with autocast(engine.model.device, resolve_dtype(config.dtype, engine.model.device)):
        answers = engine.generate_from_conversations(
            asked, config.batch_size, searching=searching, max_tokens=max(128, config.max_tokens)
        )
    seconds = time.perf_counter() - began
    scores = multi_hop_figures(queries, answers)
    shown = [[document.id for hop in info.hops for document in hop.documents] for _, info in answers]
    cited = [split_citations(text)[1] for text, _ in answers]
    named = [
        (
            [ids[n - 1] if 0 < n <= len(ids) else f"[{n}]" for n in numbers],
            (query.get("hops") or [query])[-1]["doc_ids"],
        )
        for ids, numbers, query in zip(shown, cited, queries, strict=True)
        if query["doc_ids"]
    ]
    if any(names for names, _ in named):
        scores["citation_precision"], scores["citation_recall"] = citation_scores(*zip(*named, strict=True))
    if decides:
        device = engine.model.device
        needed = oracle_decisions(queries, meta.get("start"), device, resolve_dtype(config.dtype, device))
        scores |= policy_figures(answers, needed)
    scores["seconds_per_question"] = seconds / len(queries)
    scores["prompt_tokens"] = sum(info.prompt_tokens + len(info.ids) - sum(info.mask) for _, info in answers) / len(
        queries
    )
    return scores, [text for text, _ in answers]


def evaluate_graph(
    queries: list[dict], config: Config, source: str, device: torch.device
) -> tuple[dict[str, float], list[str], dict[str, Any]]:
    """The same from the facts of a graph, of the first answer; and what all of them are worth as a set. Questions that
    name no entity are answered with nothing."""
    if config.graph is None:
        raise UserError("drag reads a graph: give --graph FOLDER (scripts.kg_prepare build makes one)")
    graph = Graph.load(config.graph)
    of, tag = with_tag(source, config)
    drag, meta = load_drag(checkpoint_root(of, find_model_tag(of, tag)), graph, device=device)
    questions = [Question(query["id"], query["query"], query["answers"]) for query in queries]
    began = time.perf_counter()
    asked, _ = ask(graph, Linker(graph), questions, meta["max_hops"], meta["hub_degree"], meta["max_facts"])
    ids = [one.question.id for one in asked.grounded]
    found = dict(zip(ids, answer_all(drag, asked, range(len(asked))), strict=True))
    seconds = time.perf_counter() - began
    answers = [found[query["id"]].answers if query["id"] in found else [] for query in queries]
    first = [names[0] if names else "" for names in answers]
    rows = []
    for query, names, text in zip(queries, answers, first, strict=True):
        worth = score_answers(names, query["answers"])
        worth = {f"set_{name}" if name in ("em", "f1") else name: value for name, value in worth.items()}
        rows.append(worth | {"em": exact_match(text, query["answers"]), "f1": f1(text, query["answers"])})
    scores = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    scores["facts_kept"] = sum(len(answer.facts) for answer in found.values()) / len(queries)
    scores["prompt_tokens"] = sum(answer.prompt_tokens for answer in found.values()) / len(queries)
    scores["seconds_per_question"] = seconds / len(queries)
    return scores, [", ".join(names) for names in answers], meta


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    if unknown := [s for s in config.systems if s.partition(":")[0] not in SYSTEMS]:
        raise UserError(f"unknown system {unknown[0]!r}: there are {', '.join(SYSTEMS)}")
    compute = compute_init(config.device, config.seed)
    queries = [query for path in config.queries for query in read_queries(path)]
    if any(system.partition(":")[0] not in SEARCHING for system in config.systems):
        queries = [query for query in queries if query["answers"]]
    if not queries:
        raise UserError(f"{', '.join(map(str, config.queries))}: no question has an answer to compare with")
    if 0 <= config.num_questions < len(queries):
        queries = random.Random(config.seed).sample(queries, config.num_questions)
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
    engines: dict[str, tuple[Engine, dict[str, Any]]] = {}
    results: dict[str, dict[str, float]] = {}
    predictions: dict[str, list[str]] = {}
    checkpoints: dict[str, str] = {}
    for system in systems:
        kind, _, source = system.partition(":")
        if kind == "drag":
            results[system], predictions[system], meta = evaluate_graph(queries, config, source or kind, compute.device)
            checkpoints[source or kind] = meta["directory"]
            print0(f"{system}: Hits@1 {results[system]['hits1']:.3f}, F1 of the sets {results[system]['set_f1']:.3f}")
            continue
        index = None
        if kind in INDEXES:
            folder = newest(checkpoint_root(kind, find_model_tag(kind)))
            index = SearchIndex.load(folder, compute.device)
            checkpoints[f"{kind} index"] = str(folder)
        source = source or (kind if kind in ("agent", "joint") else config.source)
        if source not in engines:
            if source == "joint":
                model, tokenizer, meta, _ = load_checkpoint(folder / "reader", None, compute.device)
                model.eval()
            else:
                of, tag = with_tag(source, config)
                model, tokenizer, meta = load_model(of, compute.device, "eval", tag)
            engines[source] = Engine(model, tokenizer), meta
            checkpoints[source] = meta["directory"]
        engine, meta = engines[source]
        if kind in SEARCHING:
            found = evaluate_searching(engine, queries, manager, config, meta, kind == "agent")
            results[system], predictions[system] = found
            print0(f"{system}: EM {results[system]['em']:.3f}, F1 {results[system]['f1']:.3f}")
            continue
        began = time.perf_counter()
        documents = contexts(kind, queries, manager, config.top_k, index)
        searched = time.perf_counter() - began
        room = meta["training_config"]["max_seq_len"] - config.max_tokens
        scores, predictions[system] = evaluate_system(engine, queries, documents, config, room)
        if index is not None:
            scores |= ranking_beside_bm25(index, queries, manager, config.knowledge_base)
        if kind == "rag" or index is not None:
            scores["search_seconds_per_question"] = searched / len(queries)
            for k in sorted({1, 5, 10} | {config.top_k}):
                if k <= config.top_k:
                    found = [
                        recall_at_k([d.id for d in shown], q["doc_ids"], k)
                        for shown, q in zip(documents, queries, strict=True)
                        if q["doc_ids"]
                    ]
                    if found:
                        scores[f"recall_at_{k}"] = sum(found) / len(found)
        results[system] = scores
        print0(f"{system}: EM {scores['em']:.3f}, F1 {scores['f1']:.3f}")
    tag = Path(meta["directory"]).parent.name
    name = "-".join(checkpoints).replace("/", "_")
    output = config.output or config.queries[0].parent / "eval" / f"{name}-{tag}"
    table = format_table(results, len(queries), config.top_k, manager.retriever_type if manager else "")
    print0("\n" + table)
    figures = {
        k if k.startswith("recall") and s.startswith("rag") else f"{s}_{k}": v
        for s, r in results.items()
        for k, v in r.items()
    }
    figures["n"] = len(queries)
    report = {"figures": figures, "config": config_to_dict(config), "checkpoints": checkpoints}
    atomic_write_text(output / "results.json", json.dumps(report, indent=2))
    atomic_write_text(output / "table.md", table + "\n")
    write_jsonl(
        output / "predictions.jsonl",
        (
            {"id": q["id"], "query": q["query"], "answers": q["answers"], **{s: predictions[s][i] for s in predictions}}
            for i, q in enumerate(queries)
        ),
    )
    searched: dict[str, dict[str, tuple[float, float]]] = {}
    for system, found in results.items():
        if "searches" in found:
            kind, _, source = system.partition(":")
            searched.setdefault(kind, {})[source or kind] = found["searches"], found["em"]
    plotted = ""
    if sum(map(len, searched.values())) > 1:
        plot_searches(searched, output / "searches.png")
        plotted = ", searches.png"
    print0(f"\nwrote {output}/results.json, table.md{plotted} and predictions.jsonl")
    if config.json:
        print0(json.dumps({"figures": figures}))


def format_table(results: dict[str, dict[str, float]], n: int, top_k: int, retriever: str) -> str:
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
    searching = any("searches" in r for r in results.values())
    abstaining = any("abstention_recall" in r for r in results.values())
    deciding = any("search_recall" in r or "needless_searches" in r for r in results.values())
    lines = [
        f"| {n} questions | EM | F1 | recall@{top_k} | citation P / R | prompt tokens | s / question |"
        + (" searches | documents |" if searching else "")
        + (" abstention P / R | false refusals |" if abstaining else "")
        + (" search P / R | needless |" if deciding else ""),
        "|---|---|---|---|---|---|---|" + "---|---|" * (searching + abstaining + deciding),
    ]
    for system, r in results.items():
        kind, _, source = system.partition(":")
        found = r.get(f"recall_at_{top_k}", r.get("evidence"))
        recall = "-" if found is None else f"{found:.3f}"
        seconds = r["seconds_per_question"] + r.get("search_seconds_per_question", 0)
        cited = f"{r['citation_precision']:.3f} / {r['citation_recall']:.3f}" if "citation_recall" in r else "-"
        cells = [f"{r['em']:.3f}", f"{r['f1']:.3f}", recall, cited, f"{r['prompt_tokens']:.0f}", f"{seconds:.3f}"]
        if searching:
            searches = r.get("searches", float(kind == "rag"))
            cells += [f"{searches:.2f}", f"{r.get('documents', top_k if kind == 'rag' else 0):.2f}"]
        if abstaining:
            cells.append(f"{r['abstention_precision']:.3f} / {r['abstention_recall']:.3f}")
            cells.append(f"{r['false_refusal']:.3f}" if "false_refusal" in r else "-")
        if deciding:
            needed = "search_recall" in r
            cells.append(f"{r['search_precision']:.3f} / {r['search_recall']:.3f}" if needed else "-")
            cells.append(f"{r['needless_searches']:.3f}" if "needless_searches" in r else "-")
        lines.append(f"| {names[kind]}{f' ({source})' if source else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
