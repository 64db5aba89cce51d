"""Where to put the attention: block patterns at equal parameters and tokens, on lookup among documents and on text.

    python -m bench.block_patterns --json          # about an hour on two cores; --seeds 0 a third of it

Lookup is the exercise of numbered records (nanochat/warmup.py) over 1, 2, 3 and then 5 documents, after copying; its
figure is the share of answers (number and value) right, teacher-forced, on examples with 5 documents. Text is the
invented world's, trained on from scratch; its figure is the loss per token on held-out documents. Every pattern gets an
MLP of the width that makes its parameters equal to the first one's, the same steps and the same data.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from bench.common import print_figures, start, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.model.lm import IGNORE, HybridLM, ModelConfig, parse_block_pattern
from nanochat.optim import Optimizers
from nanochat.packing import Batch, PackedBatches, TokenData
from nanochat.tokenizer import Tokenizer
from nanochat.training import autocast, resolve_dtype
from nanochat.warmup import Marks, WarmupBatches, copy_example, record_example
from tasks.example_world import generate_world

STAGES = (1, 2, 3, 5)  # documents
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Config:
    """Train models of several block patterns and compare them."""

    patterns: list[str] = field(default_factory=lambda: ["MTMT", "TTMM", "MMTT", "TTTT", "MMMM"])
    """The first one's parameters are what the others get."""
    width: int = 128
    """Model width."""
    vocabulary: int = 1024
    """Tokens of the tokenizer, trained on the world's documents."""
    rows: int = 8
    """Rows of 512 tokens in a step."""
    copy_steps: int = 200
    """Steps of copying before lookup."""
    lookup_steps: int = 600
    """Steps of lookup, shared equally by 1, 2, 3 and 5 documents."""
    text_steps: int = 300
    """Steps on text, with new weights."""
    num_documents: int = 4000
    """Documents of the world."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each gives other weights and other data."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def shape_of(pattern: str, config: Config, parameters: int | None) -> ModelConfig:
    """A model's shape; with a number of parameters, its MLP is made so wide that it has (nearly) as many."""
    shape = partial(ModelConfig.from_depth, config.vocabulary, None, pattern, config.width, 64, rope_theta=1e6)
    if parameters is None:
        return shape()
    smallest = HybridLM(shape(mlp_width=16)).num_parameters()
    per_unit = 2 * config.width * len(pattern)
    width = 16 * round((parameters - smallest) / per_unit / 16) + 16
    if width < 16:
        raise UserError(f"pattern {pattern} has more parameters than {config.patterns[0]} even without an MLP")
    return shape(mlp_width=width)


def train_on(model: HybridLM, get: Callable[[int], Batch], steps: int, optimizers: Optimizers, cooling: float) -> None:
    """Steps at a constant rate, the last share `cooling` of them with the rate falling to a twentieth."""
    dtype = resolve_dtype("auto", CPU)
    for step in range(steps):
        left = (steps - step) / (cooling * steps) if cooling else 1.0
        optimizers.set_lr_scale(max(0.05, min(1.0, left)))
        batch = get(step)
        with autocast(CPU, dtype):
            loss = model(batch.tokens, batch.targets, seq_idx=batch.seq_idx)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()


def lookup_accuracy(model: HybridLM, example: Callable, vocabulary: int, examples: int = 60) -> float:
    """Share of answers with every token right, given those before it; of answers that name their document."""
    rng = np.random.default_rng(10_000)
    right = []
    for _ in range(examples):
        ids, learned = example(rng, vocabulary)
        with torch.no_grad(), autocast(CPU, resolve_dtype("auto", CPU)):
            predicted = model(torch.tensor([ids[:-1]])).argmax(-1)[0].tolist()
        at = 1
        while at < len(ids):
            end = at
            while end < len(ids) and learned[end]:
                end += 1
            if end > at + 2:  # number, bracket, value: not a value alone
                right.append(predicted[at - 1 : end - 1] == ids[at:end])
            at = end + 1
    return sum(right) / len(right)


def one_run(pattern: str, config: Config, parameters: int | None, world: dict, seed: int) -> tuple[float, float, int]:
    """Accuracy in lookup, loss on text, parameters."""
    tokenizer = world["tokenizer"]
    drawn, marks = len(tokenizer.token_bytes), Marks.of(tokenizer)
    torch.manual_seed(seed)
    model = HybridLM(shape_of(pattern, config, parameters))
    optimizers = Optimizers(model)
    train_on(model, WarmupBatches(copy_example, drawn, 512, config.rows, seed).get, config.copy_steps, optimizers, 0)
    each = config.lookup_steps // len(STAGES)
    for documents in STAGES:
        example = partial(record_example, marks=marks, documents=documents)
        batches = WarmupBatches(example, drawn, 512, config.rows, seed)
        train_on(model, batches.get, each, optimizers, 0.5 if documents == STAGES[-1] else 0)
    accuracy = lookup_accuracy(model, partial(record_example, marks=marks, documents=STAGES[-1]), drawn)

    torch.manual_seed(seed)
    model = HybridLM(model.config)
    batches = PackedBatches(world["train"], 512, config.rows, seed)
    train_on(model, batches.get, config.text_steps, Optimizers(model), 0.5)
    held_out, total, count = PackedBatches(world["val"], 512, config.rows), 0.0, 0
    for step in range(min(8, held_out.steps_per_epoch())):
        batch = held_out.get(step)
        with torch.no_grad(), autocast(CPU, resolve_dtype("auto", CPU)):
            total += model(batch.tokens, batch.targets, seq_idx=batch.seq_idx, reduction="sum").item()
        count += (batch.targets != IGNORE).sum().item()
    return accuracy, total / count, model.num_parameters()


def make_world(config: Config) -> dict:
    """Tokenizer and texts of the invented world; a tenth of the documents is held out."""
    texts = [f"{d['title']}\n{d['content']}" for d in generate_world(config.num_documents).documents]
    random.Random(0).shuffle(texts)
    cut = len(texts) // 10
    tokenizer = Tokenizer.train(texts[cut:], config.vocabulary)
    bos = tokenizer.special_id("<|bos|>")

    def packed(part: list[str]) -> TokenData:
        encoded = [[bos, *ids] for ids in tokenizer.encode_batch(part)]
        starts = np.cumsum([0, *map(len, encoded)])[:-1]
        return TokenData.from_text(np.concatenate(encoded), starts, 512)

    return {"tokenizer": tokenizer, "train": packed(texts[cut:]), "val": packed(texts[:cut])}


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    patterns = [parse_block_pattern(p) for p in config.patterns]
    world = make_world(config)
    parameters = HybridLM(shape_of(patterns[0], config, None)).num_parameters()
    results: dict[str, list[tuple[float, float, int]]] = {p: [] for p in patterns}
    for seed in config.seeds:
        for pattern in patterns:
            results[pattern].append(one_run(pattern, config, parameters, world, seed))
            print(f"seed {seed}, {pattern}: accuracy {results[pattern][-1][0]:.3f}, loss {results[pattern][-1][1]:.3f}")
    rows, figures, means = [], {}, {}
    for pattern, runs in results.items():
        accuracies, losses = [r[0] for r in runs], [r[1] for r in runs]
        means[pattern] = (statistics.mean(accuracies), -statistics.mean(losses))
        spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}", f"{min(losses):.3f} to {max(losses):.3f}"
        rows.append([pattern, runs[0][2] / 1e6, means[pattern][0], spread[0], -means[pattern][1], spread[1]])
        figures |= {f"accuracy_{pattern}": means[pattern][0], f"loss_{pattern}": -means[pattern][1]}
    columns = ["pattern", "M parameters", "lookup accuracy, 5 documents", "range", "loss on text", "range"]
    print("\n" + table(columns, rows))
    print(f"\nbest at lookup: {max(means, key=means.__getitem__)}")
    figures["best_pattern"] = patterns.index(max(means, key=means.__getitem__))
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
