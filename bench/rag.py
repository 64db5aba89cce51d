"""What RAG fine-tuning costs beside plain chat fine-tuning: time per token of data, preparing it included.

    python -m bench.rag --json

The same documents, questions and answers twice: retrieved and shown as documents, by tasks/rag.py, and pasted into the
first message of plain conversations, so that both have the same lengths. Both train one model in turns in one sitting.
Preparing is what training waits for before its first step: searching, rendering and packing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import print_figures, start, table
from nanochat.common import keep_freed_memory, run_main
from nanochat.config import load_config
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.optim import Optimizers
from nanochat.packing import PackedBatches
from nanochat.retrieval import RetrievalManager
from nanochat.tokenizer import Tokenizer
from nanochat.training import autocast, resolve_dtype
from tasks.common import Conversation, render_examples
from tasks.example_world import generate_world
from tasks.rag import RAGTask


@dataclass(kw_only=True)
class Config:
    """Time RAG training steps beside plain ones."""

    retriever_type: str = "bm25"
    """simple or bm25."""
    num_documents: int = 2000
    """Documents of the example world."""
    examples: int = 2000
    """Conversations."""
    block_pattern: str = "M,T,M,T"
    """Blocks of the model."""
    width: int = 256
    """Its width, in heads of 64."""
    max_seq_len: int = 2048
    """Length of a row."""
    rows: int = 2
    """Rows in a step."""
    top_k: int = 5
    """Documents in a context."""
    steps: int = 3
    """Steps in one timed round."""
    rounds: int = 7
    """Timed rounds; the median counts."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def pasted(conversation: Conversation) -> Conversation:
    """The documents as text in the first message."""
    shown, first, *rest = conversation["messages"]
    text = "\n".join(f"{n} {d['title']} {d['content']}" for n, d in enumerate(shown["documents"], 1))
    return {"messages": [{**first, "content": f"{text}\n{first['content']}"}, *rest]}


def prepare(conversations: Iterable[Conversation], tokenizer: Tokenizer, config: Config) -> tuple[PackedBatches, int]:
    """Batches, and the tokens that are in them."""
    data, counts = render_examples(conversations, tokenizer, config.max_seq_len)
    return PackedBatches(data, config.max_seq_len, config.rows, 0), counts.tokens


class Trainer:
    def __init__(self, vocabulary: int, config: Config):
        torch.manual_seed(0)
        self.model = HybridLM(ModelConfig.from_depth(vocabulary, None, config.block_pattern, config.width, 64))
        self.optimizers = Optimizers(self.model)
        self.dtype = resolve_dtype("auto", torch.device("cpu"))

    def seconds(self, batches: PackedBatches, first: int, steps: int) -> float:
        began = time.perf_counter()
        for step in range(first, first + steps):
            batch = batches.get(step)
            with autocast(torch.device("cpu"), self.dtype):
                loss = self.model(batch.tokens, batch.targets, seq_idx=batch.seq_idx, reduction="sum") / batch.learned
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizers.step()
            self.optimizers.zero_grad()
        return time.perf_counter() - began


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    keep_freed_memory()
    world = generate_world(config.num_documents)
    tokenizer = Tokenizer.train((d["content"] for d in world.documents), 1024)
    queries = random.Random(0).sample(world.questions["train"], min(config.examples, len(world.questions["train"])))
    ready: dict[str, tuple[PackedBatches, int]] = {}
    preparing: dict[str, float] = {}
    manager = RetrievalManager(config.retriever_type, documents=world.documents)
    began = time.perf_counter()
    ready["rag"] = prepare(RAGTask(queries, manager, config.top_k, cite=True, absent=0.2), tokenizer, config)
    preparing["rag"] = time.perf_counter() - began
    plain = [pasted(conversation) for conversation in RAGTask(queries, manager, config.top_k, cite=True, absent=0.2)]
    began = time.perf_counter()
    ready["sft"] = prepare(plain, tokenizer, config)
    preparing["sft"] = time.perf_counter() - began
    trainer = Trainer(tokenizer.vocab_size, config)
    taken: dict[str, list[float]] = {"rag": [], "sft": []}
    for name in ready:
        trainer.seconds(ready[name][0], 0, 2)
    for number in range(config.rounds):
        for name in ready:
            taken[name].append(trainer.seconds(ready[name][0], number * config.steps, config.steps))
    rows: list[list[Any]] = []
    per_token: dict[str, tuple[float, float]] = {}
    for name, (batches, tokens) in ready.items():
        real = config.rows * config.max_seq_len * config.steps * batches.fill
        per_token[name] = statistics.median(taken[name]) / real, preparing[name] / tokens
        step, before = (1e6 * seconds for seconds in per_token[name])
        rows.append([name, tokens / len(queries), batches.fill, step, before, step + before])
    print(table(["data", "tokens / example", "rows filled", "us / token in steps", "preparing", "both"], rows))
    (rag, rag_before), (sft, sft_before) = per_token["rag"], per_token["sft"]
    figures = {"rag_over_sft_step": (rag + rag_before) / (sft + sft_before), "rag_over_sft_step_alone": rag / sft}
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
