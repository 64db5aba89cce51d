"""When to search: a policy on questions of which the model knows half closed book, and what a price does to it.

    python -m bench.agent --home data/demo --seeds 0,1,2 --json

On the world of runs/demo.sh (its base directory is --home). Its RAG model is taught the facts about some entities
closed book, each in three wordings, between examples of reading documents. The known half are questions about them in a
wording that was not taught which it then answers closed book; the unknown half are questions about entities that it
never saw which it does not. When to search is learned from what was taught, from other entities that it never saw, and
from many more that it read documents about but cannot answer closed book: with few of them it learns them by heart, and
takes strangers for known. Then scripts.agent_train, from there for every seed:

    policy    by example, then by reward at --price
    forced    the same model, made to search for every question
    never     the same model, kept from searching
    always    REFRAG by example (scripts.refrag_finetune) on the same questions: a model that learned to search for each
    prices    reinforcement from the same start at several prices: searches for what they bring
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import print_figures, run_script, start, table
from nanochat.common import run_main
from nanochat.config import load_config
from nanochat.metrics import exact_match
from nanochat.report import plot_searches
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries, write_jsonl
from tasks.example_world import relation_of, wordings
from tasks.rag import RAGTask

HALVES = ("known", "unknown")
READING = 1.0  # examples of reading documents for each that is taught closed book
REPEATS = 6  # of the latter: they are short, and every word of them has to be learned by heart
READ = 8000  # questions to learn from, at most, about entities that it read documents about


@dataclass(kw_only=True)
class Config:
    """Measure a policy of when to search."""

    home: Path = Path("data/demo")
    """Base directory of runs/demo.sh."""
    output: Path | None = None
    """Folder for what is trained; by default agent in home. It may be deleted, and a run that stopped goes on there."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the entities that are known and of training."""
    known_entities: int = 200
    """Entities whose facts are taught."""
    questions: int = 400
    """Questions of each half that every system answers, at most."""
    teach_steps: int = 1200
    """Steps that teach them."""
    supervised_steps: int = -1
    """Steps by example; -1: as in configs/agent_tiny.py."""
    rl_steps: int = -1
    """Steps by reward; -1: as in configs/agent_tiny.py."""
    algorithm: str = "grpo"
    """ppo or grpo, for policy."""
    price: float = 0.1
    """Of a search, for policy."""
    threshold: float = 0.005
    """policy searches where the model gives a search at least this probability: a model that was shown decisions is
    surer than it is right, and a missed search costs more than a needless one."""
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.1, 0.02, 0.005, 0.001])
    """Of the other curve: one model, more searches or fewer."""
    curve_algorithm: str = "ppo"
    """ppo or grpo, for the curve."""
    prices: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.6, 1.2])
    """Of the curve; empty: none."""
    curve_seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds that it is drawn for."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- what is known and what is not


def prepare(config: Config, folder: Path, seed: int) -> None:
    """The files of questions, and the talks that teach."""
    queries = config.home / "rag_examples/queries"
    manager = RetrievalManager("bm25", config.home / "rag_examples/knowledge_base")
    rng = random.Random(f"{seed}/agent")
    fresh = with_searches(read_queries(queries / "val.jsonl"), manager)  # the RAG model never saw these
    entities = sorted({query["doc_ids"][0] for query in fresh})
    rng.shuffle(entities)
    known, asked = set(entities[: config.known_entities]), set(entities[-len(entities) // 20 :])
    train: dict[str, list[dict[str, Any]]] = {half: [] for half in HALVES}
    test, val = [], []
    for query in fresh:
        entity = query["doc_ids"][0]
        if entity in known:
            texts = wordings(query, manager.documents([entity])[0].title)
            rng.shuffle(texts)
            *taught, held_out = texts
            train["known"] += [{**query, "id": f"{query['id']}_{n}", "query": text} for n, text in enumerate(taught)]
            test.append({**query, "query": held_out})
        elif entity in asked:
            val.append(query)
        else:
            train["unknown"].append(query)
    read = read_queries(queries / "train.jsonl")
    train["unknown"] += with_searches(rng.sample(read, min(READ, len(read))), manager)
    strangers = with_searches(read_queries(queries / "test.jsonl"), manager)
    rng.shuffle(test)
    few = min(100, len(val), len(test) // 4)
    write_jsonl(folder / "val.jsonl", rng.sample(val, few) + test[:few])
    asked_of = {"known": test[few:], "unknown": rng.sample(strangers, min(len(test), len(strangers)))}
    for half in HALVES:
        write_jsonl(folder / f"{half}_asked.jsonl", asked_of[half])
        write_jsonl(folder / f"{half}_train.jsonl", train[half])
    lessons = [(q["query"], q["answers"][0]) for q in train["known"]]
    # the bare name and relation helps with other wordings; it is not asked so, since the unknown half is not either
    lessons += dict.fromkeys((q["hops"][0]["query"], q["answers"][0]) for q in train["known"])
    talks = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in lessons
    ]
    reading = rng.sample(read, max(1, round(READING * len(talks))))
    task = RAGTask(reading, manager, top_k=2, cite=True, seed=seed)
    write_jsonl(folder / "talks.jsonl", talks * REPEATS + [task[i] for i in range(len(task))])


def select(config: Config, folder: Path) -> None:
    """The test questions: those of each half that the taught model answers closed book, and those that it does not."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for half in HALVES:
        asked = folder / f"data/{half}_asked.jsonl"
        closed_book(config, folder, half)
        lines = (folder / f"taught/{half}/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        said = {one["query"]: one["closed"] for one in map(json.loads, lines)}
        right = [exact_match(said[query["query"]], query["answers"]) > 0 for query in read_queries(asked)]
        print(f"{half}: {sum(right)} of {len(right)} questions answered closed book", flush=True)
        kept[half] = [q for q, r in zip(read_queries(asked), right, strict=True) if r == (half == "known")]
    count = min(config.questions, *map(len, kept.values()))
    for half, questions in kept.items():
        write_jsonl(folder / f"data/{half}_test.jsonl", questions[:count])


def with_searches(queries: list[dict[str, Any]], manager: RetrievalManager) -> list[dict[str, Any]]:
    """The questions with a search as one types it into a search box: name and relation."""
    titles = {entity: manager.documents([entity])[0].title for entity in {query["doc_ids"][0] for query in queries}}
    made = []
    for query in queries:
        text = f"{titles[query['doc_ids'][0]]} {relation_of(query).replace('_', ' ')}"
        made.append({**query, "hops": [{"query": text, "doc_ids": query["doc_ids"]}]})
    return made


# --- training


def stage(base: Path, *come_from: Path) -> bool:
    """Whether there is something to do in this base directory, which then holds the checkpoints of others."""
    if (base / "trained").exists():
        return False
    for path in come_from:
        shutil.copytree(path, base / "checkpoints" / path.name, dirs_exist_ok=True)
    return True


def run_stage(base: Path, module: str, *arguments: object) -> None:
    run_script(base, module, *arguments, "--resume", "auto")
    (base / "trained").touch()


def train(config: Config, folder: Path, seed: int, prices: list[float]) -> None:
    data = folder / "data"
    if not (data / "trained").exists():
        data.mkdir(parents=True, exist_ok=True)
        prepare(config, data, seed)
        (data / "trained").touch()
    if stage(folder / "taught", config.home / "checkpoints/rag"):
        lesson = ["configs/demo_sft.py", "--source", "rag", "--conversations", data / "talks.jsonl", "--seed", seed]
        lesson += ["--num_steps", config.teach_steps, "--warmdown_frac", 0.3, "--eval_every", 0]
        run_stage(folder / "taught", "scripts.chat_sft", *lesson)
    if not (data / "known_test.jsonl").exists():
        select(config, folder)
    # known ones half as often as others: what is known is soon right, and reading takes longer
    counts = {half: len(read_queries(data / f"{half}_train.jsonl")) for half in HALVES}
    files = [data / "known_train.jsonl"] * max(1, round(counts["unknown"] / counts["known"] / 2))
    shape = ["configs/agent_tiny.py", "--knowledge_base", config.home / "rag_examples/knowledge_base", "--seed", seed]
    shape += ["--queries", ",".join(map(str, [*files, data / "unknown_train.jsonl"]))]
    shape += ["--val_queries", data / "val.jsonl"]
    if config.supervised_steps > 0:
        shape += ["--num_steps", config.supervised_steps]
    start_from = folder / "taught/checkpoints/mid"
    for name, module in {"example": "scripts.agent_train", "always": "scripts.refrag_finetune"}.items():
        if stage(folder / name, start_from):
            run_stage(folder / name, module, *shape, "--source", "mid", "--use_rewards", "false")
    rewarded = ["--source", "agent_sft"]
    if config.rl_steps > 0:
        rewarded += ["--rl_steps", config.rl_steps]
    runs = {"policy": (config.algorithm, config.price)}
    runs |= {f"price_{price:g}": (config.curve_algorithm, price) for price in prices}
    for name, (algorithm, price) in runs.items():
        if stage(folder / name, start_from, folder / "example/checkpoints/agent_sft"):
            settings = [*rewarded, "--algorithm", algorithm, "--retrieval_price", price]
            run_stage(folder / name, "scripts.agent_train", *shape, *settings)


# --- what came of it


def evaluate(config: Config, base: Path, output: Path, system: str, questions: list[Path], *more: object) -> dict:
    """rag_eval's figures of a system in the base directory, on files of questions; they are kept in output."""
    if not (output / "results.json").exists():
        arguments = ["--knowledge_base", config.home / "rag_examples/knowledge_base", "--systems", system]
        arguments += ["--queries", ",".join(map(str, questions)), "--source", "mid", "--output", output, *more]
        run_script(base, "scripts.rag_eval", *arguments)
    return json.loads((output / "results.json").read_text())["figures"]


def answer(config: Config, folder: Path, name: str, system: str, questions: str, *more: object) -> dict[str, float]:
    """Figures of the system in folder/name on the known questions, the unknown ones or both."""
    output = folder / name / "_".join(["eval", questions, system.replace(":", "_"), *map(str, more)])
    files = [folder / f"data/{half}_test.jsonl" for half in (HALVES if questions == "both" else [questions])]
    found = evaluate(config, folder / name, output, system, files, *more)
    return {key.removeprefix(f"{system}_"): value for key, value in found.items()}


def closed_book(config: Config, folder: Path, half: str) -> dict[str, float]:
    """Figures of the taught model closed book, on all questions of which the test questions are chosen."""
    asked = [folder / f"data/{half}_asked.jsonl"]
    return evaluate(config, folder / "taught", folder / f"taught/{half}", "closed", asked)


def measure(config: Config, folder: Path) -> dict[str, float]:
    by_threshold = ("--search_threshold", config.threshold)
    systems = {
        "": ("policy", "agent", *by_threshold),
        "_example": ("example", "agent:agent_sft", *by_threshold),
        "_as_written": ("policy", "agent"),
    }
    rates = {
        f"search_rate_{half}{stage}": answer(config, folder, name, system, half, *more)["search_rate"]
        for stage, (name, system, *more) in systems.items()
        for half in reversed(HALVES)
    }
    policy, example, written = (
        answer(config, folder, name, system, "both", *more) for name, system, *more in systems.values()
    )
    return rates | {
        "em_policy": policy["em"],
        "em_always": answer(config, folder, "always", "refrag:refrag", "both")["em"],
        "em_forced": answer(config, folder, "policy", "agent", "both", "--min_hops", 1)["em"],
        "em_never": answer(config, folder, "policy", "agent", "both", "--max_hops", 0)["em"],
        "em_example": example["em"],
        "em_as_written": written["em"],
        "f1_policy": policy["f1"],
        "searches_policy": policy["searches"],
        "search_precision": policy.get("search_precision", 0.0),
        "search_recall": policy.get("search_recall", 0.0),
        **{f"taught_em_{half}": closed_book(config, folder, half)["closed_em"] for half in HALVES},
    }


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    folders = {seed: (config.output or config.home / "agent") / str(seed) for seed in config.seeds}
    found: list[dict[str, float]] = []
    curve: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed, folder in folders.items():
        prices = config.prices if seed in config.curve_seeds else []
        train(config, folder, seed, prices)
        found.append(measure(config, folder))
        print(f"seed {seed}: {found[-1]}", flush=True)
        for price in prices:
            curve[f"price {price:g}"].append(answer(config, folder, f"price_{price:g}", "agent", "both"))
        for threshold in config.thresholds if prices else []:
            one = answer(config, folder, "policy", "agent", "both", "--search_threshold", threshold)
            curve[f"threshold {threshold:g}"].append(one)
    figures: dict[str, float] = {}
    for key in found[0]:
        figures[key] = statistics.mean(of_seed[key] for of_seed in found)
        figures |= {f"{key}_{seed}": of_seed[key] for seed, of_seed in zip(folders, found, strict=True)}
    rows = [[key, figures[key], *(of_seed[key] for of_seed in found)] for key in found[0]]
    print("\n" + table(["", "mean", *(f"seed {seed}" for seed in folders)], rows))
    rows, series = [], {}
    for name, each in curve.items():
        rows.append([name, *(statistics.mean(one[key] for one in each) for key in ("searches", "em"))])
        key = name.replace(" ", "_")
        figures |= {f"searches_at_{key}": rows[-1][1], f"em_at_{key}": rows[-1][2]}
        kind, value = name.split(" ")
        series.setdefault(kind, {})[value] = (rows[-1][1], rows[-1][2])
    if rows:
        print("\n" + table(["", "searches", "EM"], rows))
        plot_searches(series, (config.output or config.home / "agent") / "searches.png")
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
