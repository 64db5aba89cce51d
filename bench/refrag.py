"""Searching while answering: what it costs, what it finds, and what each stage of its training brings.

    NANOCHAT_DATA=folder python -m bench.refrag --part hotpot --json
    python -m bench.refrag --part throughput,train --home data/demo --seeds 0,1,2 --json

hotpot: both gold paragraphs of a HotpotQA question among six, found by one search or by two, the second by rule.
throughput: 64 questions together against one at a time, with real searches. train: on the world of runs/demo.sh (its
base directory is --home), from its RAG model, the same held-out questions for all:

    single    RAG with one search, trained on the questions over two and three documents
    sft       REFRAG by example: all searches of two hops, and one in 20 of three
    rl        sft, then by reward on all questions (GRPO)
    ppo       the same with a critic
    no_mask   rl, learning from the documents' tokens too (an ablation)
    sft_all   REFRAG by example, all searches of three hops too: what is there to gain
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import print_figures, run_script, start, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries

PARTS = ("hotpot", "throughput", "train")
SYSTEMS = {
    "single": "rag",
    "sft": "refrag:refrag",
    "rl": "refrag:refrag_rl",
    "ppo": "refrag:refrag_rl",
    "no_mask": "refrag:refrag_rl",
    "sft_all": "refrag:refrag",
}


@dataclass(kw_only=True)
class Config:
    """Measure searching while answering."""

    part: list[str] = field(default_factory=lambda: list(PARTS))
    """hotpot, throughput, train; separated by commas."""
    data: Path | None = None
    """Folder with hotpotqa_distractor.jsonl.gz; by default $NANOCHAT_DATA."""
    home: Path = Path("data/demo")
    """Base directory of runs/demo.sh."""
    source: str = "refrag"
    """throughput: the checkpoint."""
    questions: int = 500
    """Questions that each system answers."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of training."""
    supervised_steps: int = -1
    """Steps by example; -1: as in configs/refrag_tiny.py."""
    rl_steps: int = -1
    """Steps by reward; -1: as in configs/refrag_tiny.py."""
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """train: which, separated by commas; rl, ppo and no_mask begin where sft ended."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- what two searches find


def hotpot(config: Config) -> dict[str, float]:
    from tasks.hotpotqa import read_hotpotqa
    from tasks.refrag import expand

    folder = config.data or Path(os.environ.get("NANOCHAT_DATA", ""))
    path = folder / "hotpotqa_distractor.jsonl.gz"
    if not path.exists():
        raise UserError(f"{path} is not there: set NANOCHAT_DATA to the folder of hotpotqa_distractor.jsonl.gz")
    documents, queries, _ = read_hotpotqa(path)
    manager = RetrievalManager("bm25", documents=documents)
    texts = [query["query"] for query in queries]
    first = manager.search(texts, 6)
    second = manager.search([expand(*pair) for pair in zip(texts, first, strict=True)], 6)
    once = [[d.id for d in found] for found in first]
    twice = []
    for found, more in zip(first, second, strict=True):
        shown = [d.id for d in found[:3]]
        twice.append(shown + [d.id for d in more if d.id not in shown][:3])
    golds = [set(query["doc_ids"]) for query in queries]
    rows = []
    for name, ids in (("one search, 6 documents", once), ("two searches, 3 and 3", twice)):
        both = statistics.mean(gold <= set(of) for gold, of in zip(golds, ids, strict=True))
        share = statistics.mean(len(gold & set(of)) / len(gold) for gold, of in zip(golds, ids, strict=True))
        rows.append((name, both, share))
    print(f"\n{len(documents):,} paragraphs, {len(queries):,} questions\n")
    print(table(["HotpotQA", "both gold paragraphs", "share of them"], rows))
    return {"hotpot_recall_single": rows[0][1], "hotpot_recall_2hop": rows[1][1]}


# --- many at once


def throughput(config: Config) -> dict[str, float]:
    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine
    from nanochat.searching import Searching
    from nanochat.training import autocast, resolve_dtype

    os.environ["NANOCHAT_BASE_DIR"] = str(config.home)
    model, tokenizer, meta = load_model(config.source)
    manager = RetrievalManager("bm25", config.home / "rag_examples/knowledge_base")
    queries = sample(config, 64)
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    searching = Searching(manager.search, meta["top_k_per_hop"], meta["max_hops"], max_doc_tokens=200)
    engine = Engine(model, tokenizer)
    settings = {"searching": searching, "max_tokens": 128}
    steps = {"together": [0, 0.0], "alone": [0, 0.0]}  # tokens, and seconds that reading each and drawing the next take
    who = "together"
    read_next = engine.read_next

    def timed(tokens, cache):
        began = time.perf_counter()
        logits = read_next(tokens, cache)
        steps[who] = [steps[who][0] + len(tokens), steps[who][1] + time.perf_counter() - began]
        return logits

    engine.read_next = timed
    dtypes = list(dict.fromkeys(["float32", str(resolve_dtype("auto", model.device)).removeprefix("torch.")]))
    rows = []
    for name in dtypes:  # the last one is what scripts.rag_eval takes by itself
        together, alone, answers = [], 0.0, {}
        with autocast(model.device, getattr(torch, name)):
            engine.generate_from_conversations(asked, 64, **settings)
            steps.update(together=[0, 0.0], alone=[0, 0.0])
            for part in range(8):  # by turns, so that what else the machine does falls on both
                who = "together"
                began = time.perf_counter()
                found = engine.generate_from_conversations(asked, 64, **settings)
                together.append(time.perf_counter() - began)
                who = "alone"
                began = time.perf_counter()
                for at in range(part, 64, 8):
                    answers[at] = engine.generate_from_conversation(asked[at], **settings)[0]
                alone += time.perf_counter() - began
        same = statistics.mean(found[at][0] == answers[at] for at in range(64))
        batch = statistics.mean(together)
        decoded = [tokens / seconds for tokens, seconds in (steps["together"], steps["alone"])]
        rows.append((name, 64 / batch, 64 / alone, alone / batch, *decoded, decoded[0] / decoded[1], f"{same:.0%}"))
    searches = statistics.mean(len(info.hops) for _, info in found)
    print(f"\n64 questions, {searches:.2f} searches each\n")
    header = ["", "questions/s together", "alone", "ratio", "tokens/s decoded together", "alone", "ratio"]
    print(table([*header, "same answers"], rows))
    ratios = {"batch64_over_1": rows[-1][3], "batch64_over_1_float32": rows[0][3], "decode64_over_1": rows[-1][6]}
    return ratios


def sample(config: Config, count: int) -> list[dict[str, Any]]:
    queries = read_queries(config.home / "rag_examples/queries/multihop_test.jsonl")
    return random.Random(0).sample(queries, count)


# --- what training brings


def train(config: Config) -> dict[str, float]:
    """Every system in its own base directory under home/refrag/<seed>, which may be deleted."""
    rows, figures = [], {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in config.systems}
    for seed in config.seeds:
        folder = config.home / "refrag" / str(seed)
        for name in config.systems:
            train_system(config, folder / name, name, seed)
            found[name].append(evaluate(config, folder / name, SYSTEMS[name]))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    for name in config.systems:
        for key in ("em", "em2", "em3", "evidence", "searches"):
            values = [of_seed[key] for of_seed in found[name]]
            figures[f"{key}_{name}"] = statistics.mean(values)
            figures |= {f"{key}_{name}_{seed}": value for seed, value in zip(config.seeds, values, strict=True)}
        rows.append((name, *(figures[f"{key}_{name}"] for key in ("em", "em2", "em3", "evidence", "searches"))))
    print("\n" + table(["system", "EM", "2 hops", "3 hops", "evidence", "searches"], rows))
    return figures


def train_system(config: Config, base: Path, name: str, seed: int) -> None:
    if (base / "trained").exists():
        return
    examples = config.home / "rag_examples"
    by_reward = SYSTEMS[name] == "refrag:refrag_rl"
    (base / "checkpoints").mkdir(parents=True, exist_ok=True)
    source = base.parent / "sft" if by_reward else config.home
    if by_reward and not (source / "trained").exists():
        raise UserError(f"{name} begins where sft ended: --systems sft,{name}")
    for stage in ("rag", "refrag") if by_reward else ("mid", "rag"):
        shutil.copytree(source / "checkpoints" / stage, base / "checkpoints" / stage, dirs_exist_ok=True)
    questions = examples / "queries/multihop_train.jsonl"
    if name == "sft":
        questions = few_of_three_hops(questions, base / "queries.jsonl")
    data = ["--knowledge_base", examples / "knowledge_base", "--seed", seed, "--queries", questions]
    data += ["--val_queries", examples / "queries/multihop_val.jsonl"]
    steps = ["--num_steps", config.supervised_steps] if config.supervised_steps > 0 else []
    if name == "single":  # as much training, documents and questions; one search with the question itself
        shape = ["configs/rag_tiny.py", "--source", "rag", "--top_k", 6, "--curriculum", "", "--max_seq_len", 1536]
        run_script(base, "scripts.rag_finetune", *shape, *data, *(steps or ["--num_steps", 800]), "--eval_every", 0)
    elif not by_reward:
        run_script(base, "scripts.refrag_finetune", "configs/refrag_tiny.py", *data, *steps, "--use_rewards", "false")
    else:
        steps = ["--rl_steps", config.rl_steps] if config.rl_steps > 0 else []
        other = {"no_mask": ["--mask_retrieved", "false"], "ppo": ["--algorithm", "ppo"]}.get(name, [])
        curve = ["--eval_every", 20, "--eval_questions", 400, "--save_every", 20]
        shape = ["configs/refrag_tiny.py", "--source", "refrag"]
        run_script(
            base,
            "scripts.refrag_finetune",
            *shape,
            *data,
            *steps,
            *other,
            *curve,
            may_fail_with="the policy has collapsed" * (name == "no_mask"),
        )
    (base / "trained").touch()


def few_of_three_hops(questions: Path, output: Path) -> Path:
    """The questions over two documents, and one in 20 of those over three."""
    queries = read_queries(questions)
    three = [query["id"] for query in queries if len(query["hops"]) == 3]
    kept = set(random.Random(0).sample(three, len(three) // 20))
    some = [query for query in queries if len(query["hops"]) == 2 or query["id"] in kept]
    output.write_text("".join(json.dumps(query) + "\n" for query in some), encoding="utf-8")
    return output


def evaluate(config: Config, base: Path, system: str) -> dict[str, float]:
    examples, shown = config.home / "rag_examples", {}
    for hops in (2, 3):
        queries = [q for q in read_queries(examples / "queries/multihop_test.jsonl") if len(q["hops"]) == hops]
        file = base / f"test{hops}.jsonl"
        file.write_text("".join(json.dumps(q) + "\n" for q in random.Random(0).sample(queries, config.questions)))
        arguments = ["--knowledge_base", examples / "knowledge_base", "--queries", file, "--systems", system]
        run_script(base, "scripts.rag_eval", *arguments, "--top_k", 6, "--output", base / f"eval{hops}")
        found = json.loads((base / f"eval{hops}/results.json").read_text())["figures"]
        shown[f"em{hops}"] = found[f"{system}_em"]
        shown[f"evidence{hops}"] = found.get(f"{system}_evidence", found.get("recall_at_6"))
        shown[f"searches{hops}"] = found.get(f"{system}_searches", 1.0)
    return shown | {key: (shown[f"{key}2"] + shown[f"{key}3"]) / 2 for key in ("em", "evidence", "searches")}


def main() -> None:
    config = load_config(Config)
    if unknown := [part for part in config.part if part not in PARTS]:
        raise UserError(f"--part {unknown[0]!r} is none of {', '.join(PARTS)}")
    if unknown := [system for system in config.systems if system not in SYSTEMS]:
        raise UserError(f"--systems {unknown[0]!r} is none of {', '.join(SYSTEMS)}")
    start(config.threads)
    figures: dict[str, float] = {}
    for name, part in (("hotpot", hotpot), ("throughput", throughput), ("train", train)):
        if name in config.part:
            figures |= part(config)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
