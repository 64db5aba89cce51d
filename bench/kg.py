"""Preparing knowledge graphs: seconds and memory at a million and at ten million facts, and MetaQA's questions.

    NANOCHAT_DATA=folder python -m bench.kg --json
    python -m bench.kg --part scale --facts 1200000 --many_facts 0 --json

scale: a file of facts about a quarter as many entities; each has a fact, the others fall by Zipf's law; 500 relations.
Read and built, loaded, its names made ready to be found in questions, each in a process of its own whose peak of memory
counts. Then `mine` and `subgraph` for questions whose answers are three steps of chance away. metaqa: the same commands
on MetaQA's test questions, and how many of the answers are among the facts around a question's entities; networkx's
shortest paths on a handful beside it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.common import print_figures, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.kg.coverage import coverage, ground
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import read_questions
from nanochat.kg.triples import read_facts

RELATIONS, VOCABULARY, CHUNK = 500, 100_000, 1 << 20
SYLLABLES = [c + v for c in "bcdfghjklmnprstvz" for v in "aiou"]


@dataclass(kw_only=True)
class Config:
    """Measure the preparation of knowledge graphs."""

    part: list[str] = field(default_factory=lambda: ["scale", "metaqa"])
    """scale, metaqa; separated by commas."""
    data: Path | None = None
    """metaqa: folder with kb.txt.gz and {1,2,3}hop_qa_test.txt.gz; by default $NANOCHAT_DATA/metaqa."""
    facts: int = 1_200_000
    """scale: facts of the smaller graph."""
    many_facts: int = 10_000_000
    """scale: facts of the larger one; 0: none."""
    questions: int = 2000
    """scale: questions to each graph."""
    num_questions: int = -1
    """metaqa: the first so many of each number of hops; -1: all."""
    peer_questions: int = 3
    """metaqa: questions for networkx, which takes seconds for each; 0: none."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- facts of chance


def word(rank: int) -> str:
    """A word for each number, no two alike."""
    syllables = []
    while rank or not syllables:
        rank, last = divmod(rank, len(SYLLABLES))
        syllables.append(SYLLABLES[last])
    return "".join(syllables[::-1])


def zipf(rng: np.random.Generator, count: int, ranks: int) -> np.ndarray:
    cumulative = np.cumsum(1 / np.arange(1, ranks + 1))
    return np.minimum(np.searchsorted(cumulative, rng.random(count) * cumulative[-1]), ranks - 1)


def names_of_chance(rng: np.random.Generator, count: int) -> list[str]:
    """Names of one to four words, of which the last is no other name's last word."""
    vocabulary = [word(rank).capitalize() for rank in range(VOCABULARY)]
    before = rng.integers(0, 4, count)
    words = iter(zipf(rng, int(before.sum()), VOCABULARY).tolist())
    return [
        " ".join([*(vocabulary[next(words)] for _ in range(number)), word(entity + VOCABULARY).capitalize()])
        for entity, number in enumerate(before.tolist())
    ]


def write_facts(path: Path, facts: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    entities = facts // 4
    names = names_of_chance(rng, entities)
    relations = [f"domain{number % 20}.type{number % 100}.relation{number}" for number in range(RELATIONS)]
    order = rng.permutation(entities)  # an entity's name says nothing of its degree
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, facts, CHUNK):
            count = min(CHUNK, facts - start)
            heads = order[zipf(rng, count, entities)]
            once = np.arange(start, min(start + count, entities))
            heads[: len(once)] = once
            tails, kinds = order[zipf(rng, count, entities)], zipf(rng, count, RELATIONS)
            rows = zip(heads.tolist(), kinds.tolist(), tails.tolist(), strict=True)
            file.writelines(f"{names[h]}\t{relations[r]}\t{names[t]}\n" for h, r, t in rows)


def write_questions(path: Path, graph: Graph, count: int, seed: int = 0) -> None:
    """From an entity three steps along facts of chance, through none of more than 100 facts, to the answer."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        while written < count:
            walked = [rng.randrange(len(graph))]
            for _ in range(3):
                places = range(graph.starts[walked[-1]], graph.starts[walked[-1] + 1])
                walked.append(int(graph.neighbours[rng.choice(places)]))
                if graph.degrees[walked[-1]] > 100:
                    break
            if len(walked) == 4:
                topic, answer = graph.name(walked[0]), graph.name(walked[-1])
                query = f"what is it that is related to {topic.lower()} by way of something else?"
                file.write(json.dumps({"id": str(written), "query": query, "answers": [answer]}) + "\n")
                written += 1


# --- each step in a process of its own


def peak_gb() -> float:
    """The most memory that this process ever held: what getrusage says counts the parent's in a new process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e9


def alone(work: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """What `work` found, and its peak_gb."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak, (work, arguments))


def _with_peak(work: Callable[..., dict[str, float]], arguments: tuple) -> dict[str, float]:
    return work(*arguments) | {"peak_gb": peak_gb()}


def build(triples: Path, folder: Path) -> dict[str, float]:
    times = [time.perf_counter()]
    facts = read_facts([triples])
    times.append(time.perf_counter())
    graph = Graph.build(facts)
    times.append(time.perf_counter())
    graph.save(folder)
    times.append(time.perf_counter())
    read, made, saved = np.diff(times).tolist()
    return {"read_s": read, "arrays_s": made, "save_s": saved, "facts": graph.num_facts, "entities": len(graph)}


def load(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    graph = Graph.load(folder)
    graph.find(graph.name(0))
    return {"load_s": time.perf_counter() - began}


def link(folder: Path, questions: Path) -> dict[str, float]:
    asked = read_questions(questions)
    began = time.perf_counter()
    linker = Linker(Graph.load(folder))
    linker.link(asked[0].text)
    ready = time.perf_counter()
    grounded = [ground(question, linker) for question in asked]
    done = time.perf_counter()
    found = coverage(grounded)["with_topic"]
    return {"linker_s": ready - began, "grounded_per_s": len(asked) / (done - ready), "with_topic": found}


def printed(name: str, graph: Path, questions: Path, *settings: object) -> str:
    """What the command says."""
    words = ["scripts.kg_prepare", name, "--graph", graph, "--questions", questions, *settings]
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"python -m {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


def rate(text: str) -> float:
    return float(re.search(r"([\d,]+) a second", text)[1].replace(",", ""))


def share(what: str, text: str) -> float:
    return float(re.search(rf"{what}\D* ([\d.]+)%", text)[1]) / 100


def graph_of_chance(folder: Path, facts: int, config: Config) -> dict[str, float]:
    triples, graph, questions = folder / f"{facts}.txt", folder / f"{facts}", folder / f"{facts}.jsonl"
    alone(_write_facts, triples, facts)
    found = {f"build_{name}": value for name, value in alone(build, triples, graph).items()}
    size = sum(path.stat().st_size for path in graph.iterdir()) / 1e9
    found |= {"text_gb": triples.stat().st_size / 1e9, "graph_gb": size}
    triples.unlink()
    found |= {f"load_{name}": value for name, value in alone(load, graph).items()}
    write_questions(questions, Graph.load(graph), config.questions)
    found |= {f"link_{name}": value for name, value in alone(link, graph, questions).items()}
    for name in ("mine", "subgraph"):
        for processes in (1, 2):
            text = printed(name, graph, questions, "--processes", processes)
            found[f"{name}_per_s_{processes}"] = rate(text)
        found[f"{name}_recall"] = share("answers reached" if name == "mine" else "answers among them", text)
    return found


def _write_facts(path: Path, facts: int) -> dict[str, float]:
    write_facts(path, facts)
    return {}


def scale(config: Config) -> dict[str, float]:
    columns: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for facts in filter(None, (config.facts, config.many_facts)):
            columns[facts] = graph_of_chance(Path(folder), facts, config)
    header = ["", *(f"{facts:,} facts" for facts in columns)]
    rows = [[name, *(column[name] for column in columns.values())] for name in columns[config.facts]]
    print(f"\n{table(header, rows)}", flush=True)
    few = columns[config.facts]
    figures = {
        "load_1m_s": few["load_load_s"],
        "build_1m_s": few["build_read_s"] + few["build_arrays_s"] + few["build_save_s"],
        "linker_1m_s": few["link_linker_s"],
        "mine_1m_questions_per_s": few["mine_per_s_1"],
        "subgraph_1m_questions_per_s": few["subgraph_per_s_1"],
    }
    if config.many_facts:
        many = columns[config.many_facts]
        figures["build_10m_s"] = many["build_read_s"] + many["build_arrays_s"] + many["build_save_s"]
        figures["peak_10m_gb"] = max(many[f"{step}_peak_gb"] for step in ("build", "load", "link"))
    return figures


# --- MetaQA


def metaqa(config: Config) -> dict[str, float]:
    folder = config.data or Path(os.environ.get("NANOCHAT_DATA", "")) / "metaqa"
    if not (folder / "kb.txt.gz").exists():
        raise UserError(f"{folder}/kb.txt.gz is not there: set NANOCHAT_DATA or --data, or leave metaqa out of --part")
    figures: dict[str, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        graph = Path(work) / "kg"
        built = alone(build, folder / "kb.txt.gz", graph)
        print(f"\nMetaQA: {built['facts']:,} facts, {built['entities']:,} entities, ", end="")
        print(f"built in {built['read_s'] + built['arrays_s'] + built['save_s']:.2f} s", flush=True)
        for hops in (1, 2, 3):
            questions = folder / f"{hops}hop_qa_test.txt.gz"
            settings = ("--processes", 1, "--num_questions", config.num_questions)
            covered = printed("coverage", graph, questions, *settings)
            mined = printed("mine", graph, questions, *settings)
            around = printed("subgraph", graph, questions, *settings, "--max_hops", hops)
            sizes = re.search(r"facts of a question: ([\d,]+) \(median\), ([\d,]+)", around)
            rows.append(
                [
                    *(hops, share("of all answers", covered), rate(mined), share("answers reached", mined)),
                    *(rate(around), sizes[1], share(r"cut off at --max_facts \d+", around)),
                    share("answers among them", around),
                ]
            )
            figures[f"mine_questions_per_s_{hops}hop"] = rate(mined)
            figures[f"subgraph_recall_{hops}hop"] = rows[-1][-1]
        if config.peer_questions:
            peer = networkx_rate(Graph.load(graph), folder / "3hop_qa_test.txt.gz", config.peer_questions)
            print(f"networkx.all_shortest_paths, 3 hops: {peer:.2g} questions/s", flush=True)
            figures["mine_over_networkx_3hop"] = figures["mine_questions_per_s_3hop"] / peer
    header = ["hops", "answers in it", "mine/s", "reached", "subgraph/s", "facts (median)", "cut", "answers among them"]
    print(f"\n{table(header, rows)}", flush=True)
    return figures


def networkx_rate(graph: Graph, path: Path, count: int) -> float:
    """Questions a second whose shortest paths networkx lists, in both directions of a fact as ours."""
    import networkx

    peer = networkx.Graph()
    peer.add_edges_from(zip(graph.heads.tolist(), graph.tails.tolist(), strict=True))
    linker = Linker(graph)
    grounded = [ground(question, linker) for question in read_questions(path)[:count]]
    began = time.perf_counter()
    for one in grounded:
        for topic in one.topics:
            for answer in one.answers:
                list(networkx.all_shortest_paths(peer, topic, answer))
    return count / (time.perf_counter() - began)


def main() -> None:
    config = load_config(Config)
    unknown = set(config.part) - {"scale", "metaqa"}
    if unknown:
        raise UserError(f"--part {','.join(config.part)}: {sorted(unknown)[0]!r} is none of scale, metaqa")
    figures: dict[str, float] = {}
    if "scale" in config.part:
        figures |= scale(config)
    if "metaqa" in config.part:
        figures |= metaqa(config)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
