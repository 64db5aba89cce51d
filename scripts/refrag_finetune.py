"""Teach a model to search while it answers: it writes a query, reads what that finds, writes the next one or answers.
Its checkpoints are of source "refrag".

    torchrun --standalone --nproc_per_node=8 -m scripts.refrag_finetune configs/refrag_hybrid_d20.py
    python -m scripts.refrag_finetune configs/refrag_tiny.py --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/multihop_train.jsonl,data/rag_examples/queries/train.jsonl

Examples are conversations with the data's gold searches (tasks/refrag.py); loss falls on searches and answer, never on
documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import torch

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import UserError, compute_cleanup, compute_init, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.engine import Engine
from nanochat.model.lm import HybridLM
from nanochat.packing import PackedBatches
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries
from nanochat.searching import Searching
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, autocast, mean_loss, resolve_dtype, rows_per_step, train
from tasks.common import load_conversations, render_examples
from tasks.refrag import MultiHopRAGTask, StaticRAGTask, model_hops, multi_hop_figures


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Fine-tune a model to search while it answers."""

    knowledge_base: Path
    """Directory or address of the knowledge base."""
    queries: list[Path] = field(default_factory=list)
    """Question files with hops (queries/multihop_train.jsonl) or without, separated by commas; by default those in
    queries/ beside the knowledge base."""
    query_samples: int = -1
    """Questions taken of each file, at random; -1: all."""
    val_queries: Path | None = None
    """Questions for validation; by default a tenth of the queries, at most 200, is held out."""
    conversations: list[Path] = field(default_factory=list)
    """Files of conversations with documents retrieved before, trained on beside the queries."""
    source: str = "rag"
    """Checkpoint to start from: rag, mid or base."""
    step: int | None = None
    """Step of that checkpoint; by default the newest."""
    retriever_type: str | None = None
    """simple, bm25, dense or hybrid; by default the one the base was built with."""
    max_hops: int = 3
    """Searches in one answer, at most."""
    top_k_per_hop: int = 3
    """Documents shown after each."""
    query_source: Literal["gold", "expander", "model"] = "gold"
    """Searches to learn from: the data's, those of a rule, or the model's own that found the gold documents."""
    cite: bool = True
    """Answers begin with the number of the document they stand in: "[4] 1904"."""
    max_doc_length: int = 500
    """Longest document in tokens; the rest is cut."""
    max_tokens: int = 128
    """What the model may write in one answer, searches included."""
    eval_questions: int = 100
    """Validation questions answered at each evaluation, with real searches."""
    device_batch_size: int = 2
    """Rows in one forward pass on one device."""
    max_seq_len: int = 4096
    """Length of a training row in tokens."""
    init_lr_frac: float = 0.1
    """Scales every learning rate; 1 for very small models."""


def question_files(config: Config) -> list[Path]:
    if config.queries or config.conversations:
        return config.queries
    folder = config.knowledge_base.parent / "queries"
    found = [path for name in ("multihop_train", "train") if (path := folder / f"{name}.jsonl").exists()]
    if not found:
        raise UserError(f"nothing to train on: give --queries FILE (there is no {folder}/multihop_train.jsonl)")
    print0(f"queries: {', '.join(map(str, found))}")
    return found


def supervised_phase(tasks: list, tokenizer: Tokenizer, config: Config, rows: int) -> Phase:
    """Every example once an epoch, in a new order with its documents shuffled anew."""
    order = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
    examples = round(config.num_epochs * len(order))
    room = float("inf") if config.num_steps < 0 else max(1, config.num_steps) * rows * config.max_seq_len

    def conversations():
        made = 0
        for epoch in count():
            shuffled = order.copy()
            random.Random(f"{config.seed}/{epoch}").shuffle(shuffled)
            for t, i in shuffled:
                if config.num_steps < 0 and made >= examples:
                    return
                made += 1
                yield tasks[t].conversation(i, epoch)

    data, counts = render_examples(conversations(), tokenizer, config.max_seq_len, config.max_doc_length, room)
    print0(f"train: {counts}")
    batches = PackedBatches(data, config.max_seq_len, rows, config.seed)
    return Phase("supervised", batches, config.num_steps if config.num_steps >= 0 else batches.steps_per_epoch())


@torch.inference_mode()
def answer_figures(
    model: HybridLM, tokenizer: Tokenizer, queries: list[dict], searching: Searching, config: Config
) -> dict[str, float]:
    """The validation questions answered with real searches."""
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    with autocast(model.device, resolve_dtype(config.dtype, model.device)):
        answers = Engine(model, tokenizer).generate_from_conversations(
            asked, 32, searching=searching, max_tokens=config.max_tokens
        )
    model.train()
    return multi_hop_figures(queries, answers)


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    compute = compute_init(config.device, config.seed)
    tag = find_model_tag(config.source, config.model_tag)
    model, tokenizer, _, _ = load_checkpoint(checkpoint_root(config.source, tag), config.step, compute.device)
    manager = RetrievalManager(config.retriever_type, config.knowledge_base)
    searching = Searching(
        manager.search, config.top_k_per_hop, config.max_hops, "answer", config.max_doc_length, config.max_seq_len
    )
    queries = []
    for path in question_files(config):
        some = read_queries(path)
        random.Random(config.seed).shuffle(some)
        queries += some[: config.query_samples] if config.query_samples >= 0 else some
    random.Random(config.seed).shuffle(queries)
    if config.val_queries:
        val_queries = read_queries(config.val_queries)
        random.Random(config.seed).shuffle(val_queries)
    else:
        held_out = min(200, len(queries) // 10)
        val_queries, queries = queries[:held_out], queries[held_out:]
    if config.query_source == "model":
        queries = model_hops(Engine(model, tokenizer), queries, searching, max_tokens=config.max_tokens)
    source = "expander" if config.query_source == "expander" else "gold"
    tasks = [StaticRAGTask([talk for path in config.conversations for talk in load_conversations(path)])]
    if queries:
        tasks.append(MultiHopRAGTask(queries, manager, config.top_k_per_hop, config.cite, source, config.seed))
    rows = rows_per_step(config, compute.world_size)
    phase = supervised_phase(tasks, tokenizer, config, rows)
    evaluate = None
    if val_queries:
        val_task = MultiHopRAGTask(val_queries[:500], manager, config.top_k_per_hop, config.cite, source, config.seed)
        data, counts = render_examples(val_task, tokenizer, config.max_seq_len, config.max_doc_length)
        print0(f"val: {counts}")
        val = PackedBatches(data, config.max_seq_len, rows, config.seed)
        answered = val_queries[: config.eval_questions]

        def evaluate() -> dict[str, float]:
            loss = mean_loss(model, val, min(8, val.steps_per_epoch()), config, compute)
            return {"val_loss": loss} | answer_figures(model, tokenizer, answered, searching, config)

    meta = {"top_k_per_hop": config.top_k_per_hop, "max_hops": config.max_hops}
    train(model, tokenizer, [phase], config, compute, checkpoint_root("refrag", tag), evaluate, meta)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
