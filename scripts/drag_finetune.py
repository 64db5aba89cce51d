"""D-RAG: teach a retriever of facts, then teach it on through the model that answers from them.

    python -m scripts.drag_finetune configs/drag_tiny.py --phase 1
    python -m scripts.drag_finetune configs/drag_tiny.py --phase 2
    torchrun --standalone --nproc_per_node=8 -m scripts.drag_finetune configs/drag_hybrid_d20.py --phase 2

Phase 1: the retriever learns from shortest paths between a question's entities and its answers. Phase 2: retriever,
projector and generator learn from the generator's answers (checkpoints of source "drag"); with --sampler none the
retriever stays as it is, a cascade, which is what D-RAG is measured against. Gao et al., "D-RAG" (EMNLP 2025).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import Compute, UserError, compute_cleanup, compute_init, get_base_dir, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.kg.drag import DRAG, DRAGConfig
from nanochat.kg.drag_data import Asked, QuestionBatches, ScaleGradient, Step, ask, evaluate_drag, read_all
from nanochat.kg.generator import LMGenerator
from nanochat.kg.gnn import FactRetriever, RetrieverConfig, Scored
from nanochat.kg.graph import Graph
from nanochat.kg.hf_generator import HFGenerator, LoRA, load
from nanochat.kg.hf_training import train_hf
from nanochat.kg.linking import Linker
from nanochat.kg.projector import Projector
from nanochat.kg.question_encoder import WORDS, build_vocabulary
from nanochat.kg.retriever_training import (
    LossConfig,
    TrainingConfig,
    evaluate_retriever,
    retriever_loss,
    train_retriever,
)
from nanochat.model.lm import HybridLM
from nanochat.training import Phase, TrainConfig, resolve_dtype, rows_per_step, train


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Train D-RAG's retriever (--phase 1), then retriever and generator together (--phase 2)."""

    phase: Literal[1, 2]
    """1: the retriever on shortest paths. 2: retriever, projector and generator on answers."""
    graph: Path = Path("data/kg")
    """Folder of the graph (scripts.kg_prepare build)."""
    questions: list[Path] = field(default_factory=list)
    """Files of questions to learn from, separated by commas."""
    val_questions: list[Path] = field(default_factory=list)
    """Questions for validation; by default a tenth of the others, at most 300, is held out."""
    num_questions: int = -1
    """So many of the questions, by chance; -1: all."""
    num_val: int = 300
    """Questions for validation, at most."""
    max_hops: int = 3
    """Facts between a question's entities and its answers, at most."""
    hub_degree: int = 100
    """Entities of more facts are not gone through, if the question does not name them."""
    max_facts: int = 4096
    """Facts around a question, at most."""
    fact_retriever: Path | None = None
    """Folder of the retriever: phase 1 writes it, phase 2 starts from it. By default fact_retriever in the base
    directory."""

    kind: Literal["steps", "gat"] = "steps"
    """Phase 1: the network (nanochat/kg/gnn.py)."""
    width: int = 64
    """Phase 1: of the network."""
    encoder: str = WORDS
    """Phase 1: words: learned here; else a model of sentence-transformers, such as all-MiniLM-L6-v2."""
    retriever_lr: float = 3e-3
    """Phase 1: AdamW's learning rate. Phase 2: of retriever and projector is beside_lr."""

    generator: str = ""
    """Phase 2: hf:PATH for a causal language model of transformers (a folder, or a name on the Hugging Face hub), which
    learns by LoRA; by default this project's own model, from --source."""
    lora_rank: int = 16
    """hf: of the adapters."""
    lora_alpha: float = 32.0
    """hf: scale of the adapters."""
    lora_dropout: float = 0.0
    """hf: in the adapters."""
    lm_lr: float = 5e-5
    """hf: AdamW's learning rate of the adapters."""
    source: str = "rag"
    """Phase 2: checkpoint of the generator to start from."""
    source_tag: str = ""
    """Model tag of that checkpoint; by default the one written last."""
    step: int | None = None
    """Step of that checkpoint; by default the newest."""
    sampler: Literal["binary", "top_k", "none"] = "binary"
    """How facts are drawn: each for itself (D-RAG's), exactly k_facts, or none: the best ones, and the retriever stays
    as it is."""
    pool: int = 24
    """Facts of a question that are drawn from: its best ones."""
    k_facts: int = 12
    """Facts shown when answering, at most."""
    min_probability: float = 0.01
    """Facts less likely than this are not shown."""
    neural: bool = True
    """A fact's vector stands before its text."""
    text: bool = True
    """A fact's text is shown."""
    closed: bool = True
    """An answer can only be names of the facts that are shown."""
    max_answers: int = 8
    """Answers that are learned of a question with many."""
    generator_frac: float = 0.5
    """First share of the steps in which the retriever stays as it is: what a model that cannot read facts yet says of
    them is noise, and would undo phase 1."""
    settle_frac: float = 0.2
    """Last share of the steps, in which the generator alone learns again, from the facts as they will be shown: what it
    read before were facts drawn by chance."""
    retriever_weight: float = 0.1
    """Of the retriever's own loss beside the generator's; 0: it learns from the generator alone."""
    balance: Literal["static", "gradient_norm"] = "static"
    """gradient_norm: what the generator says to the facts' logits counts as much as the retriever's own loss does."""
    fact_price: float = 0.0
    """Loss for each fact kept."""
    beside_lr: float = 3e-4
    """AdamW's learning rate of retriever and projector in phase 2."""
    device_batch_size: int = 16
    """Questions in one forward pass on one device."""
    max_seq_len: int = 512
    """Tokens that a question's facts take, about: total_batch_size / max_seq_len questions are a step."""
    total_batch_size: int = 8192
    """Tokens in one optimizer step, over all devices: the number of questions is this over max_seq_len."""
    init_lr_frac: float = 0.3
    """Scales every learning rate of the generator."""


def read_questions(config: Config, graph: Graph) -> tuple[Asked, list[int], list[int]]:
    """The questions with their subgraphs, and which are for training and for validation."""
    linker = Linker(graph)
    questions = read_all(config.questions, config.num_questions, config.seed)
    held_out = read_all(config.val_questions, config.num_val, config.seed) if config.val_questions else []
    asked, left_out = ask(graph, linker, [*questions, *held_out], config.max_hops, config.hub_degree, config.max_facts)
    if left_out:
        print0(f"{left_out:,} questions name no entity of the graph, and are left out")
    if not len(asked):
        raise UserError("no question names an entity of the graph: python -m scripts.kg_prepare coverage says why")
    if held_out:
        ids = {one.where for one in held_out}
        held = [at for at, one in enumerate(asked.grounded) if one.question.where in ids]
    else:
        size = min(config.num_val, len(asked) // 10)
        held = torch.randperm(len(asked), generator=torch.Generator().manual_seed(config.seed))[:size].tolist()
    train_on = sorted(set(range(len(asked))) - set(held))
    facts = sorted(len(asked.batch([at]).facts) for at in train_on[:500])
    print0(f"{len(train_on):,} questions to learn from, {len(held):,} for validation")
    print0(f"facts around a question: {facts[len(facts) // 2]:,} (median of 500), {facts[-1]:,} at most")
    return asked, train_on, held


def folder(config: Config) -> Path:
    return config.fact_retriever or get_base_dir() / "fact_retriever"


# --- phase 1


def learn_paths(config: Config, graph: Graph, asked: Asked, train_on: list[int], held: list[int]) -> None:
    vocabulary = build_vocabulary([*(asked.subgraphs.texts[at] for at in train_on), *graph.relation_names])
    shape = RetrieverConfig(config.kind, config.width, config.max_hops, encoder=config.encoder)
    retriever = FactRetriever(shape, vocabulary)
    size = sum(p.numel() for p in retriever.parameters() if p.requires_grad)
    print0(f"retriever: {config.kind}, width {config.width}, {size / 1e3:,.0f}k parameters")
    if config.plan:
        return
    directory = folder(config)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as log:

        def report(step: int, steps: int, figures: dict[str, float]) -> None:
            log.write(json.dumps({"step": step, **figures}) + "\n")
            if step == 1 or step % config.log_every == 0 or step == steps:
                shown = " | ".join(f"{name} {figures[name]:.4f}" for name in ("loss", "bce", "ranking"))
                print0(f"{step}/{steps} | {shown}")

        epochs = max(1, round(config.num_epochs))
        settings = TrainingConfig(epochs, config.retriever_lr, seed=config.seed)
        train_retriever(retriever, graph, asked.subgraphs, train_on, settings, LossConfig(), report)
    figures = evaluate_retriever(retriever, graph, asked.subgraphs, held) if held else {}
    for name in ("fact_hits@1", "any@5", "any@10", "all@10", "path_recall@10", "path_recall@100"):
        if name in figures:
            print0(f"{name:16} {figures[name]:.1%}")
    retriever.save(directory)
    print0(f"wrote {directory}; next: --phase 2")


# --- phase 2


def learn_together(
    config: Config, graph: Graph, asked: Asked, train_on: list[int], held: list[int], compute: Compute
) -> None:
    if config.balance == "gradient_norm" and not config.retriever_weight:
        raise UserError("--balance gradient_norm measures by the retriever's own loss: give it a --retriever_weight")
    retriever = FactRetriever.load(folder(config))
    if config.generator:
        generator = load_hf(config, compute)
        tag = config.model_tag or "hf"
    else:
        tag = find_model_tag(config.source, config.source_tag)
        model, tokenizer, _, _ = load_checkpoint(checkpoint_root(config.source, tag), config.step, compute.device)
        generator = LMGenerator(model, tokenizer)
    projector = Projector(retriever.config.width, generator.width)
    names = {one.name for one in dataclasses.fields(DRAGConfig)} & vars(config).keys()
    drag = DRAG(retriever, projector, generator, graph, DRAGConfig(**{name: getattr(config, name) for name in names}))
    seen: dict[str, float] = {}

    def read_facts(_: HybridLM, step: Step) -> torch.Tensor:
        retriever.eval()
        with torch.no_grad():
            scored = drag.score(step.batch)
        losses, kept = drag.losses(step.batch, scored, step.texts, "none")
        seen.update(facts_kept=kept.mean().item(), retriever_loss=0.0, answer_loss=losses.mean().item())
        return losses.sum()

    def both(_: HybridLM, step: Step) -> torch.Tensor:
        retriever.train()
        own, scored = weigh(config, drag.score(step.batch), step)
        losses, kept = drag.losses(step.batch, scored, step.texts)
        seen.update(facts_kept=kept.mean().item(), retriever_loss=own.item(), answer_loss=losses.mean().item())
        return losses.sum() + config.fact_price * kept.sum() + config.retriever_weight * own * len(losses)

    def evaluate() -> dict[str, float]:
        figures = evaluate_drag(drag, asked, held)
        drag.generator.train()
        drag.beside.train()
        return figures

    rows = rows_per_step(config, compute.world_size)
    steps = config.num_steps if config.num_steps > 0 else max(1, round(config.num_epochs * len(train_on) / rows))
    first = steps if config.sampler == "none" else round(config.generator_frac * steps)
    last = min(steps - first, round(config.settle_frac * steps))
    phases = []
    parts = (("generator", first, read_facts), ("joint", steps - first - last, both), ("settle", last, read_facts))
    for number, (name, count, loss) in enumerate(parts):
        # each begins at its own first step: in another order, or the second would have the questions of the first
        data = QuestionBatches(asked, train_on, rows, config.max_seq_len, config.seed + number)
        if count:
            phases.append(Phase(name, data, count, loss=loss, figures=lambda: dict(seen)))
    meta = {"drag": dataclasses.asdict(drag.config), "fact_retriever": dataclasses.asdict(retriever.config)}
    meta |= {"vocabulary": retriever.vocabulary, "hub_degree": config.hub_degree, "max_hops": config.max_hops}
    meta["max_facts"] = config.max_facts
    run_dir = checkpoint_root("drag", config.model_tag or tag)
    check = evaluate if held else None
    if config.generator:
        meta |= {"generator": config.generator}
        train_hf(drag, phases, config, compute, run_dir, check, meta, config.lm_lr, config.beside_lr)
        return
    best_by = "hits1" if held else ""
    beside = {"beside": drag.beside, "beside_lr": config.beside_lr}
    train(model, tokenizer, phases, config, compute, run_dir, check, meta, best_by, **beside)


def load_hf(config: Config, compute: Compute) -> HFGenerator:
    kind, _, path = config.generator.partition(":")
    if kind != "hf" or not path:
        raise UserError(f"--generator {config.generator!r}: write hf:PATH, a folder or a name on the Hugging Face hub")
    lora = LoRA(config.lora_rank, config.lora_alpha, config.lora_dropout)
    settings = {"checkpointing": config.gradient_checkpointing, "fp8": config.fp8, "fp8_emulate": config.fp8_emulate}
    dtype = str(resolve_dtype(config.dtype, compute.device)).removeprefix("torch.")
    return load(path, lora=lora, dtype=dtype, device=compute.device, **settings)


def weigh(config: Config, scored: Scored, step: Step) -> tuple[torch.Tensor, Scored]:
    """The retriever's own loss, and the scores as the generator gets them."""
    own = retriever_loss(scored, step.batch, LossConfig())["loss"]
    if config.balance == "gradient_norm" and own.requires_grad:
        (gradient,) = torch.autograd.grad(own, scored.facts, retain_graph=True)
        norm = gradient.norm() * config.retriever_weight
        scored = dataclasses.replace(scored, facts=ScaleGradient.apply(scored.facts, norm))
    return own, scored


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    graph = Graph.load(config.graph)
    asked, train_on, held = read_questions(config, graph)
    if config.phase == 1:
        if compute.is_main:  # minutes on one CPU
            learn_paths(config, graph, asked, train_on, held)
    else:
        learn_together(config, graph, asked, train_on, held, compute)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
