"""Where to put the attention: block patterns at equal parameters and tokens, on lookup among documents and on text.

    python -m bench.block_patterns --json          # 50 minutes on one core; --seeds 0 a third of it

Lookup: documents are names of several tokens, some of them shared, each with a value of two tokens; then every name is
asked for again, in another order. Trained on copying and far copying (nanochat/warmup.py); its figure is the share of
values right, teacher-forced, among 1 to 12 documents. Text is the invented world's, trained on from scratch; its figure
is the loss per token on held-out documents. Every pattern gets an MLP of the width that makes its parameters equal to
the first one's, the same steps and the same data.
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
from nanochat.warmup import Example, WarmupBatches, copy_example, far_copy_example, names
from tasks.example_world import generate_world

DOCUMENTS = (1, 2, 4, 8, 12)
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
    rows: int = 4
    """Rows of 512 tokens in a step."""
    copy_steps: int = 200
    """Steps of copying before lookup."""
    lookup_steps: int = 400
    """Steps of lookup."""
    text_steps: int = 150
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
    settings = {"rope_theta": 1e6, "mlp": "relu2"}
    shape = partial(ModelConfig.from_depth, config.vocabulary, None, pattern, config.width, 64, **settings)
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


def lookup_example(rng: np.random.Generator, vocabulary: int, documents: int) -> Example:
    """Names and their values, then all of them again in another order; the values are learned."""
    letters = rng.integers(0, vocabulary, int(rng.choice([12, 24, 48])))
    held = [(name, rng.choice(letters, 2).tolist()) for name in names(rng, documents, letters)]
    ids = [token for name, value in held for token in name + value]
    mask = [False] * len(ids)
    for i in rng.permutation(documents).tolist():
        name, value = held[i]
        ids += name + value
        mask += [False] * len(name) + [True] * len(value)
    return ids, mask


def lookup_accuracy(model: HybridLM, documents: int, vocabulary: int, questions: int = 400) -> float:
    """Share of values with both tokens right, given those before them."""
    rng = np.random.default_rng(10_000 + documents)
    right = []
    while len(right) < questions:
        ids, learned = lookup_example(rng, vocabulary, documents)
        with torch.no_grad(), autocast(CPU, resolve_dtype("auto", CPU)):
            predicted = model(torch.tensor([ids[:-1]])).argmax(-1)[0].tolist()
        firsts = [i for i in range(1, len(ids)) if learned[i] and not learned[i - 1]]
        right += [predicted[i - 1 : i + 1] == ids[i : i + 2] for i in firsts]
    return sum(right) / len(right)


def one_run(
    pattern: str, config: Config, parameters: int | None, world: dict, seed: int
) -> tuple[list[float], float, int]:
    """Accuracies in lookup among each number of DOCUMENTS, loss on text, parameters."""
    drawn = len(world["tokenizer"].token_bytes)
    torch.manual_seed(seed)
    model = HybridLM(shape_of(pattern, config, parameters))
    optimizers = Optimizers(model)
    for example, steps, cooling in ((copy_example, config.copy_steps, 0), (far_copy_example, config.lookup_steps, 0.5)):
        batches = WarmupBatches(example, drawn, 512, config.rows, seed)
        train_on(model, batches.get, steps, optimizers, cooling)
    accuracies = [lookup_accuracy(model, documents, drawn) for documents in DOCUMENTS]

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
    return accuracies, total / count, model.num_parameters()


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
    results: dict[str, list[tuple[list[float], float, int]]] = {p: [] for p in patterns}
    for seed in config.seeds:
        for pattern in patterns:
            accuracies, loss, _ = result = one_run(pattern, config, parameters, world, seed)
            results[pattern].append(result)
            print(f"seed {seed}, {pattern}: accuracy {[round(a, 3) for a in accuracies]}, loss {loss:.3f}", flush=True)
    rows, figures, means = [], {}, {}
    for pattern, runs in results.items():
        by_number = [statistics.mean(accuracies) for accuracies in zip(*(r[0] for r in runs), strict=True)]
        each = [statistics.mean(r[0]) for r in runs]
        losses = [r[1] for r in runs]
        means[pattern] = statistics.mean(each)
        spread = f"{min(each):.3f} to {max(each):.3f}", f"{min(losses):.3f} to {max(losses):.3f}"
        rows.append([pattern, runs[0][2] / 1e6, *by_number, spread[0], statistics.mean(losses), spread[1]])
        figures |= {f"accuracy_{pattern}": means[pattern], f"loss_{pattern}": statistics.mean(losses)}
    columns = ["pattern", "M parameters", *(f"{n} documents" for n in DOCUMENTS), "range of the mean", "loss on text"]
    print("\n" + table([*columns, "range"], rows))
    best = max(means, key=means.__getitem__)
    print(f"\nbest at lookup: {best}")
    print_figures(figures | {"best_pattern": patterns.index(best)}, config.json)


if __name__ == "__main__":
    run_main(main)
