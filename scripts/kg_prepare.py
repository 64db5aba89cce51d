"""A knowledge graph from files of facts, and what it has for a file of questions.

    python -m scripts.kg_prepare download --dataset webqsp --output data/webqsp
    python -m scripts.kg_prepare build --triples data/rag_examples/graph.txt --graph data/kg
    python -m scripts.kg_prepare coverage --graph data/kg --questions data/rag_examples/queries/multihop_train.jsonl
    python -m scripts.kg_prepare mine --graph data/kg --questions questions.jsonl --output data/paths.jsonl
    python -m scripts.kg_prepare subgraph --graph data/kg --questions questions.jsonl
    python -m scripts.kg_prepare text --graph data/kg --output data/facts.jsonl

download: WebQSP, CWQ (with their facts) or WebQuestions from the hub, or from files of it: --source FOLDER.
build: triples as subject|relation|object, with tabs, or N-Triples (Freebase's dump too).
coverage: which entities of the questions and answers are not in the graph.
mine: the shortest paths from a question's entities to its answers.
subgraph: the facts around a question's entities, among which a retriever chooses: how many there are, and how many of
the answers.
text: the facts of each entity as D-RAG's generator reads them, for its tokenizer and its pretraining.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Literal

import numpy as np

from nanochat.common import UserError, print0, run_main
from nanochat.config import load_config
from nanochat.kg.coverage import Grounded, coverage, ground, most_missed
from nanochat.kg.documents import fact_id
from nanochat.kg.graph import Graph
from nanochat.kg.hub import WITH_FACTS, download
from nanochat.kg.linking import Linker
from nanochat.kg.mining import Miner, neighbourhood
from nanochat.kg.questions import read_questions
from nanochat.kg.triples import read_facts
from nanochat.retrieval.document import write_jsonl

BATCH = 256  # questions that a process takes at a time


@dataclass
class Config:
    """Prepare a knowledge graph."""

    dataset: Literal["webqsp", "cwq", "web_questions"] = "webqsp"
    """download: which."""
    source: Path | None = None
    """download: a folder of its parquet or JSONL files, where the hub cannot be reached."""
    graph: Path = Path("data/kg")
    """Folder of the graph."""
    triples: list[Path] = field(default_factory=list)
    """build: files of facts, separated by commas."""
    questions: Path | None = None
    """coverage, mine, subgraph: a file of questions with answers."""
    aliases: Path | None = None
    """Other names of entities: alias<tab>name a line."""
    num_questions: int = -1
    """The first so many; -1: all."""
    max_hops: int = 3
    """Facts between a question's entities and its answers, at most."""
    hub_degree: int = 100
    """Entities of more facts are not gone through, if the question does not name them."""
    max_facts: int = 4096
    """subgraph: facts of one question, at most."""
    output: Path | None = None
    """mine, subgraph: a JSONL file of what was found for each question. text: a JSONL file. download: a folder."""
    processes: int = 0
    """0: one for each core."""


def fetch(config: Config) -> None:
    output = config.output or Path("data") / config.dataset
    download(config.dataset, output, config.source)
    print0(f"wrote {output}")
    if config.dataset in WITH_FACTS:
        print0(f"next: python -m scripts.kg_prepare build --triples {output}/facts.txt --graph {output}/graph")
    else:
        print0("its graph is Freebase: build one of the dump, or of another set's facts.txt, then look at its coverage")


def build(config: Config) -> None:
    if not config.triples:
        raise UserError("give --triples FILE")
    began = time.perf_counter()
    facts = read_facts(config.triples)
    print0(facts.report)
    Graph.build(facts).save(config.graph)
    print0(f"wrote {config.graph} in {time.perf_counter() - began:.1f} s")
    print0(f"next: python -m scripts.kg_prepare coverage --graph {config.graph} --questions FILE")


def show_coverage(config: Config) -> None:
    grounded = grounded_questions(config, Graph.load(config.graph))
    figures = coverage(grounded)
    print0(f"questions                    {len(grounded):,}")
    for name, what in (
        ("with_topic", "that name an entity"),
        ("with_all_answers", "with all answers"),
        ("with_any_answer", "with an answer"),
        ("answers", "of all answers"),
    ):
        print0(f"{what:28} {figures[name]:.2%}")
    for name, count in most_missed(grounded):
        print0(f"not in the graph: {name!r}, {count:,} times")
    for one in itertools.islice((one for one in grounded if not one.topics), 3):
        print0(f"names no entity: {one.question.where}: {one.question.text!r}")


def mine(config: Config) -> None:
    graph, records, seconds = over_questions(config, _mine)
    reached = [hops for record in records for hops in record["hops"]]
    facts = [len(record["facts"]) for record in records if len(record["facts"])]
    print0(f"{len(records):,} questions in {seconds:.1f} s, {len(records) / seconds:,.0f} a second")
    print0(f"answers reached: {sum(hops >= 0 for hops in reached) / max(1, len(reached)):.2%}")
    for hops in sorted(set(reached) - {-1}):
        print0(f"  after {hops} facts: {reached.count(hops) / len(reached):.2%}")
    print0(f"facts on the shortest paths of a question: {statistics.median(facts) if facts else 0:.0f} (median)")
    write(config, graph, records)


def subgraph(config: Config) -> None:
    graph, records, seconds = over_questions(config, _subgraph)
    sizes = sorted(record["size"] for record in records)
    recalls = [record["answer_recall"] for record in records if record["answers"]]
    print0(f"{len(records):,} questions in {seconds:.1f} s, {len(records) / seconds:,.0f} a second")
    print0(f"facts of a question: {statistics.median(sizes):,.0f} (median), {sizes[-1]:,} at most")
    print0(f"cut off at --max_facts {config.max_facts}: {sum(r['cut'] for r in records) / len(records):.2%}")
    print0(f"answers among them: {statistics.mean(recalls) if recalls else 0:.2%}")
    write(config, graph, records)


def write_texts(config: Config) -> None:
    """By chance: neighbours in a graph's order are alike, and training takes texts in their order."""
    if config.output is None:
        raise UserError("give --output FILE.jsonl")
    graph = Graph.load(config.graph)
    facts = np.argsort(graph.heads, kind="stable")
    each = np.split(facts, np.flatnonzero(np.diff(graph.heads[facts])) + 1) if len(facts) else []
    order = np.random.default_rng(0).permutation(len(each))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    texts = ("\n".join("|".join(graph.spoken(fact)) for fact in each[at].tolist()) for at in order)
    write_jsonl(config.output, ({"text": text} for text in texts))
    print0(f"wrote {config.output}: {graph.num_facts:,} facts of {len(each):,} entities")


_COMMANDS = {
    "download": fetch,
    "build": build,
    "coverage": show_coverage,
    "mine": mine,
    "subgraph": subgraph,
    "text": write_texts,
}


# --- over all questions


def grounded_questions(config: Config, graph: Graph) -> list[Grounded]:
    if config.questions is None:
        raise UserError("give --questions FILE")
    questions = read_questions(config.questions)
    if config.num_questions >= 0:
        questions = questions[: config.num_questions]
    linker = Linker(graph, read_aliases(config.aliases) if config.aliases else ())
    return [ground(question, linker) for question in questions]


def read_aliases(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        alias, tab, name = line.partition("\t")
        if line.strip() and not (tab and alias.strip() and name.strip()):
            raise UserError(f"{path}:{number}: {line[:80]!r} is not alias<tab>name")
        if line.strip():
            yield alias.strip(), name.strip()


Ends = tuple[list[int], list[int]]  # topics and answers of a question: what is sent to a process


def over_questions(config: Config, work: Callable[[Sequence[Ends]], list[dict]]) -> tuple[Graph, list[dict], float]:
    """What `work` finds for all questions, in their order, and the seconds that took."""
    graph = Graph.load(config.graph)
    grounded = grounded_questions(config, graph)
    ends = [(one.topics, one.answers) for one in grounded]
    batches = [ends[at : at + BATCH] for at in range(0, len(ends), BATCH)]
    processes = min(config.processes or os.cpu_count() or 1, len(batches))
    if processes <= 1:
        _begin(config)
        began = time.perf_counter()
        found = list(itertools.chain.from_iterable(map(work, batches)))
    else:
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(processes + 1)
        with context.Pool(processes, _begin, (config, ready)) as pool:
            ready.wait()  # all are there before the clock runs
            began = time.perf_counter()
            found = list(itertools.chain.from_iterable(pool.imap(work, batches)))
    seconds = time.perf_counter() - began
    records = [
        {"id": one.question.id, "query": one.question.text, "topics": one.topics, "answers": one.answers} | what
        for one, what in zip(grounded, found, strict=True)
    ]
    return graph, records, seconds


_OWN: dict[str, object] = {}  # of a process: its settings, graph and miner


def _begin(config: Config, ready: Barrier | None = None) -> None:
    graph = Graph.load(config.graph)
    _OWN.update(config=config, graph=graph, miner=Miner(graph, config.max_hops, config.hub_degree))
    if ready is not None:
        ready.wait()


def _mine(batch: Sequence[Ends]) -> list[dict]:
    mine, records = _OWN["miner"].mine, []
    for topics, answers in batch:
        paths = mine(topics, answers)
        records.append({"hops": paths.hops.tolist(), "facts": paths.facts})
        if _OWN["config"].output:
            records[-1]["first"] = mine(topics, answers[:1]).facts
    return records


def _subgraph(batch: Sequence[Ends]) -> list[dict]:
    config, graph = _OWN["config"], _OWN["graph"]
    records = []
    for topics, answers in batch:
        around = neighbourhood(graph, topics, config.max_hops, config.hub_degree, config.max_facts)
        ends = np.concatenate([graph.heads[around.facts], graph.tails[around.facts]])
        among = float(np.isin(answers, ends).mean()) if answers else 0.0
        found = {"size": len(around.facts), "cut": not around.complete, "answer_recall": among}
        records.append(found | ({"facts": around.facts} if config.output else {}))
    return records


def write(config: Config, graph: Graph, records: list[dict]) -> None:
    """Facts and entities by name. What `mine` writes are queries, too: their documents are the facts on paths to the
    first answer, by their ids in a knowledge base of facts."""
    if config.output is None:
        return
    for record in records:
        for name in ("topics", "answers"):
            record[name] = [graph.name(entity) for entity in record[name]]
        record["facts"] = [graph.text(fact) for fact in record["facts"]]
        if "first" in record:
            record["doc_ids"] = [fact_id(graph.triple(fact)) for fact in record.pop("first")]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(config.output, records)
    print0(f"wrote {config.output}")


def main() -> None:
    argv = sys.argv[1:]
    command = argv.pop(0) if argv and argv[0] in _COMMANDS else ""
    config = load_config(
        Config, argv, prog=f"python -m scripts.kg_prepare {command or '{' + ','.join(_COMMANDS) + '}'}"
    )
    if not command:
        raise UserError(
            f"say what to do: python -m scripts.kg_prepare {'|'.join(_COMMANDS)} ...; --help lists the settings"
        )
    _COMMANDS[command](config)


if __name__ == "__main__":
    run_main(main)
