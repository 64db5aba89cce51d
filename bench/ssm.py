"""Speed of one Mamba-2 mixer, forward and backward: ours, transformers' torch path, and attention of the same width.

    python -m bench.ssm --json

All in one run, side by side. transformers' mixer (pip install transformers) is timed at several chunk sizes, among
them its default of 256; attention is four projections around torch's fused scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import print_figures, side_by_side, start, table
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.model.mamba import Mamba2

HEAD_DIM = 64


@dataclass(kw_only=True)
class Config:
    """Time one mixer of each kind."""

    width: int = 256
    """Model width."""
    sizes: list[str] = field(default_factory=lambda: ["4x512", "4x1024", "4x2048", "2x4096", "1x8192"])
    """Batch x length of each cell."""
    states: list[int] = field(default_factory=lambda: [64, 128])
    """State widths N."""
    hf_chunks: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
    """Chunk sizes of transformers' mixer."""
    rounds: int = 7
    """Timed rounds; the median counts."""
    threads: int = 2
    """CPU threads."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


class FusedAttention(nn.Module):
    """Causal attention around torch's scaled_dot_product_attention, without positions."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, D // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, L, D))


def our_mixer(width: int, d_state: int) -> Mamba2:
    mixer = Mamba2(width, d_state, expand=2, head_dim=HEAD_DIM, n_groups=1, d_conv=4, eps=1e-5)
    mixer.init_states()
    return mixer


def hf_mixer(width: int, d_state: int, chunk: int) -> nn.Module:
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    except ImportError:
        raise UserError('transformers is missing: pip install "nanochat[hf]"') from None
    config = Mamba2Config(
        hidden_size=width,
        num_heads=2 * width // HEAD_DIM,
        head_dim=HEAD_DIM,
        expand=2,
        state_size=d_state,
        n_groups=1,
        conv_kernel=4,
        chunk_size=chunk,
    )
    return Mamba2Mixer(config, layer_idx=0)


def pass_of(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """One forward and backward pass, gradients of weights and input."""

    def run() -> None:
        for p in module.parameters():
            p.grad = None
        given = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(given)
        y.float().sum().backward()

    return run


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    rows, over_best, over_256, bf16_gain = [], [], [], []
    over_sdpa: dict[int, list[float]] = {}
    for size in config.sizes:
        B, L = map(int, size.split("x"))
        x = torch.randn(B, L, config.width)
        for N in config.states:
            ours = our_mixer(config.width, N)
            runs = {"ours": pass_of(ours, x), "bf16": pass_of(ours, x, torch.bfloat16)}
            runs["attention"] = pass_of(FusedAttention(config.width), x)
            runs |= {f"hf {q}": pass_of(hf_mixer(config.width, N, q), x) for q in config.hf_chunks}
            seconds = side_by_side(runs, config.rounds)
            hf = {q: seconds[f"hf {q}"] for q in config.hf_chunks}
            best = min(hf, key=hf.__getitem__)
            over_best.append(hf[best] / seconds["ours"])
            over_256.append(hf.get(256, float("nan")) / seconds["ours"])
            over_sdpa.setdefault(L, []).append(seconds["attention"] / seconds["ours"])
            bf16_gain.append(seconds["ours"] / seconds["bf16"])
            rates = [B * L / seconds[name] / 1000 for name in ("ours", "bf16", f"hf {best}", "attention")]
            rows.append([size, N, *rates, best, over_best[-1], over_256[-1], over_sdpa[L][-1]])
            print(f"{size}, state {N}: {over_best[-1]:.2f} of transformers' best (chunk {best})", flush=True)
    header = ["batch x length", "N", "ours", "ours bf16", "transformers", "attention", "its best chunk"]
    print("\nthousand tokens/s, fp32 unless said; the last three columns are ratios of time to ours\n")
    print(table([*header, "over its best", "over its 256", "over attention"], rows))
    ahead = [L for L, ratios in sorted(over_sdpa.items()) if min(ratios) >= 1]
    print(f"\nfaster than attention from length {ahead[0] if ahead else '-'} on (of those measured)")
    figures = {
        "over_hf_best_min": min(over_best),
        "over_hf_256_min": min(over_256),
        "bf16_over_fp32": min(bf16_gain),
    } | {f"over_sdpa_{L}": min(ratios) for L, ratios in over_sdpa.items()}
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
