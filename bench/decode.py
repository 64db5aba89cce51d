"""Decoding: tokens/s after prompts of growing length for attention, hybrid and Mamba models of equal width.

    python -m bench.decode --json

The state after a prompt is filled with random numbers, since the speed does not depend on what was read. Then: what a
batch of 16 gains over one row, and what a follow-up question on the same documents gains by reuse of what was read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.common import print_figures, side_by_side, start, table
from nanochat.common import run_main
from nanochat.config import load_config
from nanochat.engine import Engine, Request
from nanochat.model.cache import Cache, KeyValues
from nanochat.model.lm import HybridLM, ModelConfig, default_block_pattern
from nanochat.sampling import Sampling
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.training import autocast

VOCABULARY = 4096


@dataclass(kw_only=True)
class Config:
    """Time decoding after prompts of several lengths."""

    width: int = 256
    """Model width."""
    depth: int = 6
    """Blocks of each model."""
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768])
    """Tokens read before."""
    batches: list[int] = field(default_factory=lambda: [1, 16])
    """Rows decoded together."""
    max_gigabytes: float = 4.0
    """Cells whose state is larger are left out."""
    tokens: int = 16
    """Tokens decoded in one timed round."""
    documents: int = 4096
    """Tokens of documents before the follow-up question."""
    rounds: int = 7
    """Timed rounds; the median counts."""
    threads: int = 2
    """CPU threads."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    compile: bool = False
    """Compile what Mamba blocks do with one token."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def filled_cache(model: HybridLM, batch: int, length: int, dtype: torch.dtype) -> Cache:
    """As if `length` tokens of every row had been read."""
    c, cache = model.config, model.new_cache(batch)
    inner = c.mamba_expand * c.d_model
    for layer in cache.layers:
        if isinstance(layer, KeyValues):
            shape = (batch, c.n_kv_head, length + 64, c.head_dim)
            layer.k, layer.v = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        else:
            layer.conv = torch.randn(batch, c.d_conv - 1, inner + 2 * c.mamba_groups * c.d_state, dtype=dtype)
            layer.ssm = torch.randn(batch, inner // c.mamba_head_dim, c.mamba_head_dim, c.d_state)
    cache.lengths += length
    cache.max_length = length
    return cache


def decoding(model: HybridLM, cache: Cache, config: Config) -> Callable[[], None]:
    lengths, longest = cache.lengths, cache.max_length

    @torch.inference_mode()
    def run() -> None:
        cache.lengths, cache.max_length = lengths, longest  # each round goes on from the same place
        token = torch.zeros(len(lengths), 1, dtype=torch.long)
        with autocast(torch.device("cpu"), getattr(torch, config.dtype)):
            for _ in range(config.tokens):
                token = model(token, cache=cache, last_only=True).argmax(-1, keepdim=True)

    return run


def measure_decoding(models: dict[str, HybridLM], config: Config) -> tuple[list[list], dict[tuple, float], dict]:
    rows, rates, sizes = [], {}, {}
    for batch in config.batches:
        for length in config.lengths:
            runs = {}
            for name, model in models.items():
                one = filled_cache(model, 1, length, getattr(torch, config.dtype))
                sizes[name, length] = one.nbytes
                if batch * one.nbytes <= config.max_gigabytes * 1e9:
                    cache = one if batch == 1 else filled_cache(model, batch, length, getattr(torch, config.dtype))
                    runs[name] = decoding(model, cache, config)
            for name, seconds in side_by_side(runs, config.rounds).items():
                rates[name, batch, length] = batch * config.tokens / seconds
            shown = [rates.get((name, batch, length), "-") for name in models]
            rows.append([batch, length, *shown, *(sizes[name, length] / 2**20 for name in models)])
            print(f"batch {batch}, length {length}: {shown}", flush=True)
    return rows, rates, sizes


def follow_up(model: HybridLM, config: Config) -> float:
    """Seconds to the first token without reuse over those with it: a second question on the same documents."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    generator = torch.Generator().manual_seed(0)
    special = tokenizer.special_id
    body = torch.randint(0, 256, (config.documents,), generator=generator).tolist()
    documents = [special("<|bos|>"), special("<|retrieval_start|>"), *body, special("<|retrieval_end|>")]

    def question(n: int) -> list[int]:
        text = tokenizer.encode(f" What about the {n}th of them, and why?")
        return [special("<|user_start|>"), *text, special("<|user_end|>"), special("<|assistant_start|>")]

    without, with_reuse = Engine(model, tokenizer), Engine(model, tokenizer, prefix_bytes=1 << 30)
    asked = iter(range(10_000))

    def read(engine: Engine) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            engine.prefill([Request([*documents, *question(next(asked))], Sampling(), tokenizer)])

        return run

    seconds = side_by_side({"without": read(without), "with": read(with_reuse)}, config.rounds)
    return seconds["without"] / seconds["with"]


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    patterns = {"T": "T" * config.depth, "hybrid": default_block_pattern(config.depth), "M": "M" * config.depth}
    vocabulary = max(VOCABULARY, 256 + len(SPECIAL_TOKENS))
    models = {
        name: HybridLM(ModelConfig.from_depth(vocabulary, block_pattern=pattern, d_model=config.width)).eval()
        for name, pattern in patterns.items()
    }
    if config.compile:
        for model in models.values():
            model.compile_steps()
    rows, rates, sizes = measure_decoding(models, config)
    names = [f"{name} ({patterns[name]})" for name in models]
    print(f"\ntokens/s, width {config.width}, {config.dtype}; state of one row in MiB\n")
    print(table(["batch", "length", *names, *(f"{name} MiB" for name in models)], rows))
    near_8k = min(config.lengths, key=lambda n: abs(n - 8192))
    first, last = config.batches[0], config.batches[-1]
    near_2k = min(config.lengths, key=lambda n: abs(n - 2048))
    gain = {n: rates["hybrid", last, n] / rates["hybrid", first, n] for n in (min(config.lengths), near_2k)}
    figures = {
        "hybrid_over_T_8k": rates["hybrid", first, near_8k] / rates["T", first, near_8k],
        "mamba_over_T_8k": rates["M", first, near_8k] / rates["T", first, near_8k],
        "state_bytes_hybrid_over_T_8k": sizes["hybrid", near_8k] / sizes["T", near_8k],
        "state_bytes_mamba_over_T_8k": sizes["M", near_8k] / sizes["T", near_8k],
        f"batch{last}_over_{first}": gain[near_2k],
        f"batch{last}_over_{first}_shortest": gain[min(config.lengths)],
        "prefix_reuse_ratio": follow_up(models["hybrid"], config),
    }
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
