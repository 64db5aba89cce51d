"""A search index that learns from answers, against the same steps of supervised training, on the example world.

    python -m bench.joint --home data/joint --rag data/demo/checkpoints/rag/demo --seeds 0,1,2 --json

1,000 documents. The index is trained on pseudo-queries alone (start); then with the same steps

    supervised  pseudo-queries again
    marginal    and the answers of questions: likelihoods marginalised over its best documents
    policy      and the answers of questions: policy gradient
    joint       all three

No question's document is told. Hits@1 of other questions about the same documents. Everything is made in home/<seed>,
which may be deleted.
"""

from __future__ import annotations

import random
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import print_figures, run_script, start, table
from nanochat.checkpoint_manager import newest
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.dsi.index import SearchIndex
from nanochat.dsi.training import evaluate_index, found_by_bm25
from nanochat.retrieval.document import read_documents, read_queries, write_jsonl

SYSTEMS = {
    "supervised": ["--marginal", 0, "--policy", 0],
    "marginal": ["--policy", 0],
    "policy": ["--marginal", 0],
    "joint": [],
}
HELD_OUT = 500


@dataclass(kw_only=True)
class Config:
    """Measure learning from answers."""

    home: Path = Path("data/joint")
    """Where everything is kept."""
    rag: Path = Path("data/demo/checkpoints/rag/demo")
    """Checkpoint folder of the model that answers from documents (runs/demo.sh)."""
    documents: int = 1000
    """Of the example world."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of training."""
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """supervised, marginal, policy, joint; separated by commas."""
    num_steps: int = 1200
    """Of the index on pseudo-queries."""
    joint_steps: int = 200
    """Of each of the others."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def prepare(config: Config) -> Path:
    """Documents, and the questions about them in two halves: to learn from, and to measure with."""
    data = config.home / "data"
    if not (data / "measured.jsonl").exists():
        config.home.mkdir(parents=True, exist_ok=True)
        settings = ["--mode", "example", "--output", data, "--num_documents", config.documents]
        run_script(config.home, "scripts.prepare_rag_dataset", *settings)
        queries = [query for query in read_queries(data / "queries/train.jsonl") if query["answers"]]
        random.Random(0).shuffle(queries)
        write_jsonl(data / "learned.jsonl", queries[HELD_OUT:])
        write_jsonl(data / "measured.jsonl", queries[:HELD_OUT])
    return data


def train(config: Config, data: Path, seed: int) -> None:
    base = config.home / str(seed)
    documents = ["--documents", data / "documents.jsonl", "--seed", seed, "--eval_every", 0]
    if not (base / "start").exists():
        base.mkdir(parents=True, exist_ok=True)
        shutil.copytree(config.rag, base / "checkpoints/rag/demo", dirs_exist_ok=True)
        settings = ["--model_tag", "start", "--num_steps", config.num_steps]
        run_script(base, "scripts.dsi_train", "configs/dsi_tiny.py", *documents, *settings)
        (base / "start").touch()
    for name in config.systems:
        if (base / name).exists():
            continue
        settings = ["--queries", data / "learned.jsonl", "--index_tag", "start", "--model_tag", name, *SYSTEMS[name]]
        settings += ["--num_steps", config.joint_steps]
        run_script(base, "scripts.joint_train", "configs/joint_tiny.py", *documents, *settings)
        (base / name).touch()


def main() -> None:
    config = load_config(Config)
    if unknown := [name for name in config.systems if name not in SYSTEMS]:
        raise UserError(f"--systems {unknown[0]!r} is none of {', '.join(SYSTEMS)}")
    start(config.threads)
    data = prepare(config)
    queries = read_queries(data / "measured.jsonl")
    found: dict[str, list[dict[str, float]]] = {
        "bm25": [found_by_bm25(read_documents(data / "documents.jsonl"), queries)]
    }
    for seed in config.seeds:
        train(config, data, seed)
        root = config.home / str(seed) / "checkpoints"
        for name in ("start", *config.systems):
            index = SearchIndex.load(newest(root / ("dsi" if name == "start" else "joint") / name))
            found.setdefault(name, []).append(evaluate_index(index, queries))
            print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name][-1].items()), flush=True)
    means = {name: {key: statistics.mean(of[key] for of in each) for key in each[0]} for name, each in found.items()}
    print("\n" + table(["index", "Hits@1", "Hits@10", "MRR"], [(name, *of.values()) for name, of in means.items()]))
    figures = {f"{key}_{name}": value for name, of in means.items() for key, value in of.items()}
    for name, each in found.items():
        figures |= {f"hits1_{name}_{seed}": of["hits1"] for seed, of in zip(config.seeds, each, strict=False)}
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
