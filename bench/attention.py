"""Speed of causal attention on a CPU: ours for packed documents against torch's fused one, forward and backward.

    python -m bench.attention --json

Rows of documents of one length: the fused attention is called once for each document, ours takes all together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import print_figures, side_by_side, start, table
from nanochat.common import run_main
from nanochat.config import load_config
from nanochat.model.packed import Packing, packed_attention


@dataclass(kw_only=True)
class Config:
    """Time attention over packed documents."""

    tokens: int = 4096
    """Tokens in the batch."""
    lengths: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])
    """Lengths of the documents, each dividing tokens."""
    n_head: int = 2
    """Heads of width 64."""
    rounds: int = 9
    """Timed rounds; the median counts."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def one_by_one(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    parts = zip(*(t.split(length, dim=2) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2)


def pass_of(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for t in inputs:
            t.grad = None
        attend(*inputs).sum().backward()

    return run


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    rows, figures = [], {}
    for length in config.lengths:
        row: list[object] = [length]
        for dtype in (torch.float32, torch.bfloat16):
            shape = (1, config.n_head, config.tokens, 64)
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            packing = Packing.of(torch.arange(config.tokens)[None] // length)
            seconds = side_by_side(
                {
                    "fused": pass_of(lambda q, k, v, n=length: one_by_one(q, k, v, n), inputs),
                    "ours": pass_of(lambda q, k, v, p=packing: packed_attention(q, k, v, p), inputs),
                },
                config.rounds,
            )
            ratio = seconds["fused"] / seconds["ours"]
            row += [seconds["fused"] * 1e3, seconds["ours"] * 1e3, ratio]
            figures[f"over_fused_{str(dtype)[6:]}_{length}"] = ratio
        rows.append(row)
    columns = [f"{name}, {dtype}" for dtype in ("fp32", "bf16") for name in ("fused ms", "ours ms", "ratio")]
    print(table(["document length", *columns], rows))
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
