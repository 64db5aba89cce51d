"""HybridLM: a decoder of attention (T) and Mamba-2 (M) blocks, each followed by an MLP.

Pre-norm residual blocks: x + mixer(norm(x)), x + mlp(norm(x)). Depth sets width as in nanochat (width = 64 * depth).
Shapes: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.model.attention import Attention, rotary_tables
from nanochat.model.cache import Cache
from nanochat.model.gates import GatedFacts
from nanochat.model.linear import Linear
from nanochat.model.loss import sum_of_losses
from nanochat.model.mamba import Mamba2
from nanochat.model.packed import Packing

IGNORE = -1  # a target that is not learned


def parse_block_pattern(pattern: str | list[str]) -> str:
    """ "T,T,M,M", "TTMM" or ["T", "T", "M", "M"] -> "TTMM". ValueError names what is wrong."""
    blocks = "".join(pattern) if isinstance(pattern, list) else pattern
    blocks = blocks.replace(",", "").replace(" ", "").upper()
    if not blocks or set(blocks) - set("TM"):
        raise ValueError(f"block_pattern {pattern!r} must be made of T (attention) and M (Mamba-2), like 'M,T,M,T'")
    return blocks


def default_block_pattern(depth: int) -> str:
    """Mamba first, attention spread: every second block in a shallow model, every fifth in a deep one."""
    if depth <= 6:
        return "".join("MT"[i % 2] for i in range(depth))
    return "".join("T" if i % 5 == 2 else "M" for i in range(depth))


@dataclass
class ModelConfig:
    vocab_size: int
    block_pattern: str = "MTMT"
    d_model: int = 256
    n_head: int = 4
    n_kv_head: int = 4
    head_dim: int = 64
    rope: bool = True
    rope_theta: float = 10_000.0
    d_state: int = 64
    mamba_expand: int = 2
    mamba_head_dim: int = 64
    mamba_groups: int = 1
    d_conv: int = 4
    mlp: str = "swiglu"  # or "relu2"
    mlp_width: int = 1024
    tie_embeddings: bool = False
    value_head: bool = False
    """A critic: one number from each state (nanochat/rl/ppo.py)."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self.block_pattern = parse_block_pattern(self.block_pattern)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        inner = self.mamba_expand * self.d_model
        if "M" in self.block_pattern and inner % self.mamba_head_dim:
            raise ValueError(f"mamba_head_dim {self.mamba_head_dim} does not divide the inner width {inner}")
        if self.mlp not in ("relu2", "swiglu"):
            raise ValueError(f"mlp {self.mlp!r} must be 'relu2' or 'swiglu'")

    @classmethod
    def from_depth(
        cls,
        vocab_size: int,
        depth: int | None = None,
        block_pattern: str | None = None,
        d_model: int | None = None,
        head_dim: int | None = None,
        **overrides,
    ) -> ModelConfig:
        """The one dial: depth (or the pattern's length) sets the width, 64 per block, and everything else from it."""
        pattern = parse_block_pattern(block_pattern) if block_pattern else default_block_pattern(depth or 4)
        if depth is not None and depth != len(pattern):
            raise ValueError(f"depth {depth} and block_pattern {block_pattern!r} of {len(pattern)} blocks disagree")
        width = d_model or 64 * len(pattern)
        head_dim = head_dim or (128 if width % 128 == 0 and width >= 768 else 64 if width % 64 == 0 else 32)
        n_head = max(1, width // head_dim)
        swiglu = (
            overrides.get("mlp", cls.mlp) == "swiglu"
        )  # 8/3 of the width: as many parameters as 4 with two matrices
        settings = {
            "d_model": width,
            "head_dim": head_dim,
            "n_head": n_head,
            "n_kv_head": n_head,
            "d_state": 128 if width >= 768 else 64,
            "mlp_width": -(-8 * width // (3 * 64)) * 64 if swiglu else 4 * width,
        }
        return cls(vocab_size, pattern, **{**settings, **overrides})


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """relu2: down(relu(up x)^2) (So et al. 2021, Primer); swiglu: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, d_model: int, width: int, kind: str):
        super().__init__()
        self.up_proj = Linear(d_model, width)
        self.gate_proj = Linear(d_model, width) if kind == "swiglu" else None
        self.down_proj = Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.step: Callable[..., Tensor] | None = None  # one decoded token, compiled
        self.compiled_feed: Callable[[Tensor], Tensor] | None = None  # for training
        self.mixer_norm = RMSNorm(c.d_model, c.norm_eps)
        if kind == "T":
            self.mixer = Attention(c.d_model, c.n_head, c.n_kv_head, c.head_dim)
        else:
            self.mixer = Mamba2(
                c.d_model, c.d_state, c.mamba_expand, c.mamba_head_dim, c.mamba_groups, c.d_conv, c.norm_eps
            )
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c.d_model, c.mlp_width, c.mlp)

    def forward(self, x: Tensor, **context) -> Tensor:
        feed = self.compiled_feed if self.training and self.compiled_feed else self.feed
        return feed(x + self.mixer(self.mixer_norm(x), **context))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))


class HybridLM(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.block_pattern)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.value_head = nn.Linear(config.d_model, 1) if config.value_head else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices uniform with variance 1/fan_in; what writes into the residual stream starts at zero (nanochat), so
        that each block begins as the identity."""
        self.embed.weight.normal_(std=1.0)
        if not self.config.tie_embeddings:
            self.lm_head.weight.normal_(std=0.001)
        if self.value_head is not None:
            self._zero_value_head()
        for block in self.blocks:
            for name, p in block.named_parameters():
                if p.ndim == 2 and name.endswith("proj.weight"):
                    p.uniform_(-1, 1).mul_(math.sqrt(3 / p.shape[1]))
            if block.kind == "T":
                block.mixer.o_proj.weight.zero_()
            else:
                block.mixer.init_states()
                block.mixer.out_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()

    def _zero_value_head(self) -> None:
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def add_value_head(self) -> None:
        """Give a model that was trained without one a critic that says 0."""
        if self.value_head is None:
            self.config.value_head = True
            self.value_head = nn.Linear(self.config.d_model, 1, device=self.device)
            self._zero_value_head()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def description(self) -> str:
        pattern, width, size = self.config.block_pattern, self.config.d_model, self.num_parameters() / 1e6
        return f"`{pattern}`, width {width}, {size:.2f}M parameters, vocabulary {self.config.vocab_size}"

    def flops_per_token(self, length: int) -> float:
        """Matrix-product FLOPs of forward and backward per token at a context length (6 per weight, plus attention's
        and the scan's own products)."""
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 12 * c.n_head * c.head_dim * length / 2  # causal: half the square
        inner = c.mamba_expand * c.d_model
        scan = 6 * (64 * inner + 2 * inner * c.d_state)
        return 6 * weights + c.block_pattern.count("T") * attention + c.block_pattern.count("M") * scan

    def new_cache(self, batch_size: int) -> Cache:
        return Cache(self.config.block_pattern, batch_size, self.device)

    def compile_steps(self) -> None:
        """Compile what Mamba blocks do with one decoded token, dozens of small operations: little more than half the
        time at one row. The first tokens wait for the compiler (on a CPU, C++), 10 to 20 seconds. Attention blocks
        stay as they are: their caches change shape with every token."""
        for block in self.blocks:
            if block.kind == "M":
                block.step = torch.compile(block.forward)

    def compile_mlps(self) -> None:
        """Compile the second half of every block for training on a GPU, and FP8's roundings with it. The mixers stay as
        they are: their kernels are fused already, and packed documents change their shapes with every batch."""
        for block in self.blocks:
            block.compiled_feed = torch.compile(block.feed)

    def forward(
        self,
        tokens: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: Tensor | None = None,
        valid: Tensor | None = None,
        facts: GatedFacts | None = None,
        reduction: str = "mean",
        last_only: bool = False,
        depth: int | None = None,
        states: bool = False,
    ) -> Tensor:
        """Logits (B, L, V), or with targets the cross-entropy.

        tokens (B, L) or embeds (B, L, D). targets (B, L), IGNORE where nothing is learned; only the learned positions
        go through the output layer. reduction: "mean", "sum", or "none" for one loss per learned position, in row
        order. seq_idx (B, L) marks packed documents: attention does not look across and the scan restarts.
        cache: continue from it and extend it; valid (B,) then counts each row's real tokens, right padding follows.
        facts: tokens that are there as much as their facts' gates say (gates.py); with a cache that is empty, ungated.
        last_only: logits (B, V) of each row's last real token. depth: only the first blocks, for training them first.
        states: the normed states (B, L, D) that the output layer would get, in place of logits.
        """
        if cache is not None and seq_idx is not None:
            raise ValueError("packed documents (seq_idx) cannot be combined with a cache")
        if facts is not None and seq_idx is not None:
            raise ValueError("facts cannot be combined with packed documents (seq_idx)")
        if facts is not None and cache is not None and (facts.gate is not None or cache.max_length):
            raise ValueError("a cache takes facts without gates, before anything else: leave out those not chosen")
        x = self.embed(tokens) if embeds is None else embeds
        B, L, _ = x.shape
        positions = torch.arange(L, device=x.device).unsqueeze(0) if facts is None else facts.positions()
        needed = 0
        if cache is not None:
            positions = cache.lengths.unsqueeze(-1) + positions
            needed = cache.max_length + L
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta) if self.config.rope else None
        packing = Packing.of(seq_idx) if seq_idx is not None and "T" in self.config.block_pattern else None
        pairs = facts.pairs() if facts is not None and "T" in self.config.block_pattern else None
        for i, block in enumerate(self.blocks[:depth]):
            layer = cache.layers[i] if cache is not None else None
            if block.kind == "T":
                context = {"rotary": rotary, "packing": packing, "pairs": pairs}
                if cache is not None:
                    context |= {"cache": layer, "positions": positions, "needed": needed}
            else:
                context = {"seq_idx": seq_idx, "cache": layer, "valid": valid, "facts": facts}
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False, **context)
            elif block.step is not None and L == 1 and layer is not None and layer.ssm is not None:
                x = block.step(x, **context)
            else:
                x = block(x, **context)
        if cache is not None:
            cache.advance(L, valid)
        if targets is not None:
            learned = (targets != IGNORE).flatten()
            h = self.norm(x.flatten(0, 1)[learned])
            answers = targets.flatten()[learned]
            if reduction == "none":
                return F.cross_entropy(self.lm_head(h).float(), answers, reduction="none")
            total = sum_of_losses(h, self.lm_head.weight, answers)
            # a batch without a learned token has loss 0, not nan
            return total if reduction == "sum" else total / max(1, len(answers))
        if last_only:
            x = x[:, -1] if valid is None else x[torch.arange(B, device=x.device), valid - 1]
        if states:
            return self.norm(x)
        return self.lm_head(self.norm(x)).float()
