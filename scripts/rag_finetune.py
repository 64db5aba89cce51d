"""Teach a model to answer from retrieved documents. Its checkpoints are of source "rag".

    torchrun --standalone --nproc_per_node=8 -m scripts.rag_finetune configs/rag_hybrid_d20.py --top_k 5
    python -m scripts.rag_finetune --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/train.jsonl --base_tasks "" --source mid

Training examples come from a queries file (gold documents among retrieved distractors, RAFT: arXiv 2403.10131; with
--absent some without them, where the answer is that the documents do not say), from base tasks, whose questions get
retrieved documents, and from plain conversations. Very small models learn lookup over few documents first, which is
what --curriculum is for.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import Compute, UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.model.lm import HybridLM
from nanochat.model.lora import add_lora
from nanochat.packing import PackedBatches
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, mean_loss, rows_per_step, train
from tasks.common import load_conversations, load_tasks, render_examples
from tasks.rag import PlainTask, RAGTask, RetrievalTask


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Fine-tune a hybrid model to answer from retrieved documents."""

    knowledge_base: Path
    """Directory of the knowledge base (python -m nanochat.retrieval builds one)."""
    source: str = "mid"
    """Checkpoint to start from: mid or base; rag: go on from an earlier run, under a new name (save_tag)."""
    save_tag: str = ""
    """Name of the new checkpoint's folder; by default that of the checkpoint it starts from."""
    step: int | None = None
    """Step of that checkpoint; by default the newest."""
    retriever_type: str = "simple"
    """simple, bm25, dense or hybrid."""
    top_k: int = 5
    """Documents in a context."""
    queries: list[Path] | None = None
    """Question files, separated by commas; by default queries/train.jsonl beside the knowledge base, where there is
    one. Empty: none."""
    val_queries: Path | None = None
    """Questions for validation; by default a tenth of the queries, at most 200, is held out."""
    base_tasks: list[str] = field(default_factory=lambda: ["SmolTalk"])
    """Chat tasks whose questions get retrieved documents: SmolTalk, Dolly, separated by commas; empty for none."""
    task_samples: int = -1
    """Conversations taken of each base task; -1: all."""
    smoltalk_path: Path | None = None
    """A local copy of SmolTalk (.jsonl)."""
    dolly_path: Path | None = None
    """The file of Dolly 15k."""
    questions_per_document: int = 1
    """Questions asked of every document shown, in one talk: more learned tokens for each token read. 0: only one."""
    cite: bool = True
    """Answers begin with the numbers of the documents they come from: "[2] 1904"."""
    quote: bool = False
    """Behind the numbers stands the sentence that the answer is in: "[2] “He was born in 1904.” 1904"."""
    absent: float = 0.0
    """Share of the questions asked whose documents are not among those shown; the answer is then that the documents do
    not say, as it is for questions without an answer."""
    distractors: Literal["retrieved", "random"] = "retrieved"
    """The other documents of a context: those that a search finds, or any (for comparison)."""
    gold_first: bool = False
    """Documents that answer stand before the others, for comparison; by default in any place."""
    conversations: list[Path] = field(default_factory=list)
    """Files with plain conversations {"messages": [...]} a line, so that the model still chats without documents."""
    chat_share: float = 0.1
    """Share of the examples that are such conversations, where there are some."""
    curriculum: list[str] = field(default_factory=list)
    """Stages as documents:share of the training, like "1:0.2,5:0.5,1-5:0.3"; empty: top_k all along. 1-5: each context
    has 1 to 5 documents, so that the model stays at home with few."""
    max_doc_length: int = 500
    """Longest document in tokens; the rest is cut."""
    block_pattern: str = ""
    """The pattern the checkpoint must have; empty: any with Mamba blocks."""
    allow_transformer: bool = False
    """Accept a model without Mamba blocks (a baseline)."""
    device_batch_size: int = 4
    """Rows in one forward pass on one device."""
    max_seq_len: int = 4096
    """Length of a training row in tokens."""
    init_lr_frac: float = 0.1
    """Scales every learning rate; 1 for very small models that still have to learn lookup."""
    lora_rank: int = 0
    """Train low-rank matrices beside the blocks' projections instead of the weights (LoRA); 0: all weights. They learn
    at scalar_lr, and checkpoints hold the model with them merged."""
    lora_alpha: float = 32.0
    """LoRA's matrices are scaled by this over their rank."""


def check_pattern(model: HybridLM, config: Config) -> None:
    """RAG here is for models with Mamba blocks; a Transformer is let through only as a baseline."""
    pattern = model.config.block_pattern
    wanted = config.block_pattern.replace(",", "").upper()
    if wanted and wanted != pattern:
        raise UserError(
            f"the checkpoint's block_pattern is {','.join(pattern)}, not {config.block_pattern}: train one with "
            f"python -m scripts.base_train --block_pattern {config.block_pattern}, or leave --block_pattern out"
        )
    if "M" not in pattern and not config.allow_transformer:
        mixed = ",".join("MT"[i % 2] for i in range(max(2, len(pattern))))
        raise UserError(
            f"block_pattern {','.join(pattern)} has no Mamba block; train a base model with one that has, such as "
            f"--block_pattern {mixed}, or use --allow_transformer for a baseline"
        )


def question_files(config: Config) -> list[Path]:
    if config.queries is not None:
        return config.queries
    beside = config.knowledge_base.parent / "queries/train.jsonl"
    if beside.exists():
        print0(f"queries: {beside}")
        return [beside]
    return []


def parse_curriculum(stages: list[str], top_k: int) -> list[tuple[int, int, float]]:
    """[(fewest documents, most documents, share)], shares adding up to 1."""
    if not stages:
        return [(top_k, top_k, 1.0)]
    parsed = []
    for stage in stages:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*:\s*([\d.]+)\s*", stage)
        try:
            low, high, share = int(match[1]), int(match[2] or match[1]), float(match[3])
        except (TypeError, ValueError):
            raise UserError(f'--curriculum {",".join(stages)}: write it as "1:0.2,5:0.5,1-5:0.3"') from None
        parsed.append((low, high, share))
    total = sum(share for *_, share in parsed)
    if any(not 1 <= low <= high or share <= 0 for low, high, share in parsed) or abs(total - 1) > 0.01:
        raise UserError(f"--curriculum {','.join(stages)}: at least one document a stage, and shares that add up to 1")
    return [(low, high, share / total) for low, high, share in parsed]


def make_phases(tasks: list, tokenizer: Tokenizer, config: Config, rows: int) -> list[Phase]:
    """One phase per stage of the curriculum, each with fresh shuffles of the examples it needs."""
    order = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
    phases, epochs = [], count()
    for low, high, share in parse_curriculum(config.curriculum, config.top_k):
        # with num_steps, enough examples are rendered to fill its share of the steps without a repeat
        wanted = None if config.num_steps < 0 else max(1, round(share * config.num_steps))
        examples = round(share * config.num_epochs * len(order))
        room = float("inf") if wanted is None else wanted * rows * config.max_seq_len

        def conversations(examples=examples, low=low, high=high, wanted=wanted):
            made = 0
            while wanted is not None or made < examples:
                epoch = next(epochs)
                shuffled = order.copy()
                rng = random.Random(f"{config.seed}/{epoch}")
                rng.shuffle(shuffled)
                for t, i in shuffled:
                    if wanted is None and made >= examples:
                        return
                    made += 1
                    yield tasks[t].conversation(i, epoch, rng.randint(low, high))

        data, counts = render_examples(conversations(), tokenizer, config.max_seq_len, config.max_doc_length, room)
        documents = str(low) if low == high else f"{low}-{high}"
        print0(f"train, {documents} documents: {counts}")
        batches = PackedBatches(data, config.max_seq_len, rows, config.seed)
        phases.append(Phase(f"{documents}-doc", batches, wanted or max(1, batches.steps_per_epoch())))
    return phases


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    if not 0 <= config.absent < 1:
        raise UserError(f"--absent {config.absent}: a share, at least 0 and below 1")
    if config.lora_rank < 0:
        raise UserError(f"--lora_rank {config.lora_rank}: at least 1, or 0 to train all weights")
    if config.lora_rank and (config.fp8 or config.fp8_emulate):
        raise UserError("--lora_rank and --fp8 cannot be combined: 8-bit products are of weights that learn")
    compute: Compute = compute_init(config.device, config.seed)
    tag = find_model_tag(config.source, config.model_tag)
    new_tag = config.save_tag or tag
    if config.source == "rag" and new_tag == tag:
        raise UserError("--source rag needs --save_tag NAME: under its own name the new run would replace the old one")
    model, tokenizer, _, _ = load_checkpoint(checkpoint_root(config.source, tag), config.step, compute.device)
    check_pattern(model, config)
    if config.lora_rank:
        adapted = add_lora(model, config.lora_rank, config.lora_alpha)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print0(f"LoRA of rank {config.lora_rank} on {adapted} projections: {learned:,} parameters learn")
    manager = RetrievalManager(config.retriever_type, config.knowledge_base)
    queries = [q for path in question_files(config) for q in read_queries(path)]
    base = load_tasks(
        config.base_tasks, {"smoltalk": config.smoltalk_path, "dolly": config.dolly_path}, config.task_samples
    )
    if not queries and not base:
        raise UserError("nothing to train on: give --queries FILE or --base_tasks")
    val_queries = read_queries(config.val_queries) if config.val_queries else []
    if queries and not val_queries:
        random.Random(config.seed).shuffle(queries)
        held_out = min(200, len(queries) // 10)
        val_queries, queries = queries[:held_out], queries[held_out:]
    make_task = partial(
        RAGTask,
        manager=manager,
        top_k=config.top_k,
        questions_per_document=config.questions_per_document,
        cite=config.cite,
        quote=config.quote,
        absent=config.absent,
        distractors=config.distractors,
        gold_first=config.gold_first,
        seed=config.seed,
    )
    tasks: list[RAGTask | RetrievalTask | PlainTask] = []
    if queries:
        tasks.append(make_task(queries))
    if base:
        tasks.append(RetrievalTask(base, manager, config.top_k))
    if chat := [talk for path in config.conversations for talk in load_conversations(path)]:
        if not 0 < config.chat_share < 1:
            raise UserError(f"--chat_share {config.chat_share}: a share between 0 and 1")
        beside = sum(map(len, tasks))
        tasks.append(PlainTask(chat, round(beside * config.chat_share / (1 - config.chat_share))))
    rows = rows_per_step(config, compute.world_size)
    phases = make_phases(tasks, tokenizer, config, rows)
    evaluate = None
    if val_queries:
        val_task = make_task(val_queries[:1000])
        data, counts = render_examples(val_task, tokenizer, config.max_seq_len, config.max_doc_length)
        print0(f"val, {config.top_k} documents: {counts}")
        val = PackedBatches(data, config.max_seq_len, rows, config.seed)

        def evaluate() -> dict[str, float]:
            return {"val_loss": mean_loss(model, val, min(8, val.steps_per_epoch()), config, compute)}

    meta = {"top_k": config.top_k, "retriever_type": config.retriever_type}
    train(model, tokenizer, phases, config, compute, checkpoint_root("rag", new_tag), evaluate, meta)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
