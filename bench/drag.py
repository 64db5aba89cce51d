"""D-RAG on MetaQA: a cascade of retriever and generator against both trained together.

    NANOCHAT_DATA=folder python -m bench.drag --home data/metaqa --seeds 0,1,2 --json

graph: as bench.kg measures it, without its ten million facts. gradient: the gates' straight-through gradient against
the exact one, over all subsets of 10 facts, and whether 4 useful facts of 50 are found by the loss of what reads them
alone. metaqa: a generator is pretrained on the demo's exercises in lookup and on the graph's facts, in their alphabet
(home/base); then for each seed, in its own base directory home/<seed>,

    phase 1   the retriever learns from shortest paths
    cascade   the generator learns to read its best facts; the retriever stays
    joint     the same steps and questions; retriever, projector and generator learn together in the second half

from the dev questions of one, two and three facts together, and answers of the test questions of each. cascade_few and
joint_few: phase 1 has the paths of 600 questions alone, and in phase 2 the retriever learns from the answers alone, as
where nobody knows which facts a question needs.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import kg
from bench.common import print_figures, run_script, start, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.kg.sampler import binary_gates, top_k_gates

PARTS = ("graph", "gradient", "metaqa")
CASCADE = ["--sampler", "none"]
FEW = ["--num_steps", 300, "--pool", 12, "--k_facts", 10, "--fact_price", 0, "--retriever_weight", 0]
# settings of phase 1, and of phase 2
SYSTEMS = {
    "cascade": (["--num_epochs", 2], CASCADE),
    "joint": (["--num_epochs", 2], []),
    "cascade_few": (["--num_questions", 600, "--num_epochs", 8], FEW + CASCADE),
    "joint_few": (["--num_questions", 600, "--num_epochs", 8], FEW),
}
HOPS = (1, 2, 3)
SOURCE = "checkpoints/base/start"
FIGURES = {name: name for name in ("hits1", "hit", "f1", "em", "facts_kept")} | {"recall": "retriever_recall"}


@dataclass(kw_only=True)
class Config:
    """Measure D-RAG."""

    part: list[str] = field(default_factory=lambda: list(PARTS))
    """graph, gradient, metaqa; separated by commas."""
    data: Path | None = None
    """Folder with metaqa/; by default $NANOCHAT_DATA."""
    home: Path = Path("data/metaqa")
    """Where graph, retrievers and models are kept."""
    questions: int = 1000
    """Test questions of each number of facts."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of training."""
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """cascade, joint, cascade_few, joint_few; separated by commas."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- gates


def gradient(config: Config) -> dict[str, float]:
    N, K = 10, 3
    torch.manual_seed(0)
    logits = torch.randn(N)
    cosines: dict[str, list[float]] = {"binary": [], "top_k": []}
    for seed in range(6):
        loss = set_function(seed, N)
        for kind, found in cosines.items():
            own = logits.clone().requires_grad_()
            subsets, probability = law(kind, own, K)
            (exact,) = torch.autograd.grad((probability * loss(subsets)).sum(), own)
            rows = logits.expand(40_000, N).clone().requires_grad_()
            (mean,) = torch.autograd.grad(loss(draw(kind, rows, K)).sum(), rows)
            found.append(torch.cosine_similarity(mean.mean(0), exact, dim=0).item())
    rows = [(kind, statistics.mean(found), min(found), planted(kind)) for kind, found in cosines.items()]
    print("\n" + table(["gates", "cosine with the exact gradient, mean of 6", "worst", "planted recall@4"], rows))
    worst = min(statistics.mean(found) for found in cosines.values())
    return {"gradient_cosine": worst, "planted_recall_at_4": min(row[3] for row in rows)}


def draw(kind: str, logits: Tensor, k: int) -> Tensor:
    mask = torch.ones_like(logits, dtype=torch.bool)
    return binary_gates(logits, mask) if kind == "binary" else top_k_gates(logits, mask, k)


def set_function(seed: int, size: int):
    """A loss of sets that no sum over their members gives."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(size, 16, generator=generator), torch.randn(16, generator=generator)
    return lambda gates: torch.tanh(gates @ inner) @ outer


def law(kind: str, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All that may be drawn (X, N), and with what probabilities (X,): each fact for itself, or k one after another."""
    N = len(logits)
    if kind == "binary":
        subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=N)))
        p = logits.sigmoid()
        return subsets, torch.where(subsets > 0, p, 1 - p).prod(1)
    orders = torch.tensor(list(itertools.permutations(range(N), k)))
    weights = logits.exp()
    left, probability = weights.sum().expand(len(orders)), torch.ones(len(orders))
    for drawn in orders.T:
        probability, left = probability * weights[drawn] / left, left - weights[drawn]
    return torch.zeros(len(orders), N).scatter(1, orders, 1.0), probability


def planted(kind: str, steps: int = 400) -> float:
    """Of 4 facts without which the loss is high, among 50: the share among the 4 best logits, mean of 5 draws."""
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        useful = torch.randperm(50)[:4]
        logits = torch.zeros(50, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(steps):
            gates = draw(kind, logits.expand(32, 50), 4)
            missing = (1 - gates[:, useful]).square().sum(1)
            loss = (missing + 0.05 * gates.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(len(set(logits.topk(4).indices.tolist()) & set(useful.tolist())) / 4)
    return statistics.mean(found)


# --- MetaQA


def metaqa(config: Config) -> dict[str, float]:
    data = (config.data or Path(os.environ.get("NANOCHAT_DATA", ""))) / "metaqa"
    if not (data / "kb.txt.gz").exists():
        raise UserError(f"{data}/kb.txt.gz is not there: set NANOCHAT_DATA to the folder that metaqa is in")
    graph = pretrain(config.home, data / "kb.txt.gz")
    asked = test_questions(config, graph, data)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in config.seeds:
        for name in config.systems:
            train_system(config, graph, data, name, seed)
            for hops, figures in evaluate(config, asked, name, seed).items():
                found.setdefault((name, hops), []).append(figures)
                shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                print(f"seed {seed}, {name}, {hops} facts: {shown}", flush=True)
    rows, figures = [], {}
    for (name, hops), each in found.items():
        means = {key: statistics.mean(of[key] for of in each) for key in FIGURES}
        rows.append((name, hops, *means.values()))
        figures |= {f"{FIGURES[key]}_{name}_{hops}hop": value for key, value in means.items()}
        figures |= {f"hits1_{name}_{hops}hop_{s}": of["hits1"] for s, of in zip(config.seeds, each, strict=True)}
    print("\n" + table(["system", "facts", "Hits@1", "Hit", "F1", "EM", "facts kept", "answer among them"], rows))
    return figures


def pretrain(home: Path, triples: Path) -> Path:
    """The graph's folder, and home/base with a generator that has read its facts."""
    graph, base, facts = home / "kg", home / "base", home / "base/facts.jsonl"
    base.mkdir(parents=True, exist_ok=True)
    if not graph.exists():
        run_script(base, "scripts.kg_prepare", "build", "--triples", triples, "--graph", graph)
    if not facts.exists():
        run_script(base, "scripts.kg_prepare", "text", "--graph", graph, "--output", facts)
    if not (base / "tokenizer").exists():
        run_script(base, "scripts.tok_train", "--input", facts, "--vocab_size", 1024)
    if not (base / SOURCE).exists():
        run_script(base, "scripts.base_train", "configs/demo_base.py", "--model_tag", "start", "--input", facts)
    return graph


def test_questions(config: Config, graph_folder: Path, data: Path) -> dict[int, Any]:
    from nanochat.kg.drag_data import ask, read_all
    from nanochat.kg.graph import Graph
    from nanochat.kg.linking import Linker

    graph = Graph.load(graph_folder)
    linker = Linker(graph)
    asked = {}
    for hops in HOPS:
        questions = read_all([data / f"{hops}hop_qa_test.txt.gz"])
        questions = random.Random(0).sample(questions, min(config.questions, len(questions)))
        asked[hops], left_out = ask(graph, linker, questions, 3, 100, 4096)
        if left_out:
            print(f"{hops} facts: {left_out} questions name no entity")
    return asked


def train_system(config: Config, graph: Path, data: Path, name: str, seed: int) -> None:
    base, (first, second) = folder(config, name, seed), SYSTEMS[name]
    common = ["configs/drag_metaqa.py", "--graph", graph, "--seed", seed, "--questions"]
    common.append(",".join(str(data / f"{hops}hop_qa_dev.txt.gz") for hops in HOPS))
    if not (base / "fact_retriever/retriever.json").exists():
        base.mkdir(parents=True, exist_ok=True)
        run_script(base, "scripts.drag_finetune", *common, "--phase", 1, *first)
    if (base / f"trained_{name}").exists():
        return
    shutil.copytree(config.home / "base" / SOURCE, base / SOURCE, dirs_exist_ok=True)
    tag = ["--source_tag", "start", "--model_tag", name, "--eval_every", 0]
    run_script(base, "scripts.drag_finetune", *common, "--phase", 2, *tag, *second)
    (base / f"trained_{name}").touch()


def folder(config: Config, name: str, seed: int) -> Path:
    return config.home / (f"{seed}_few" if "_few" in name else str(seed))


def evaluate(config: Config, asked: dict[int, Any], name: str, seed: int) -> dict[int, dict[str, float]]:
    from nanochat.kg.drag import load_drag
    from nanochat.kg.drag_data import evaluate_drag

    root = folder(config, name, seed) / "checkpoints/drag" / name
    drag, _ = load_drag(root, asked[HOPS[0]].graph)
    return {hops: evaluate_drag(drag, of, range(len(of))) for hops, of in asked.items()}


def main() -> None:
    config = load_config(Config)
    for given, known, flag in ((config.part, PARTS, "part"), (config.systems, SYSTEMS, "systems")):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"--{flag} {unknown[0]!r} is none of {', '.join(known)}")
    start(config.threads)
    figures: dict[str, float] = {}
    if "graph" in config.part:
        figures |= kg.scale(kg.Config(many_facts=0))
        figures |= kg.metaqa(kg.Config(data=config.data and config.data / "metaqa"))
    if "gradient" in config.part:
        figures |= gradient(config)
    if "metaqa" in config.part:
        figures |= metaqa(config)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
