"""What a model remembers between calls: keys and values for attention blocks, (conv, ssm) states for Mamba blocks.

Rows of a batch may have different lengths: they are padded on the right, `lengths` says how many tokens of each row
are real, and the next tokens of a row overwrite its padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeyValues:
    """k, v: (B, H_kv, capacity, head_dim). Grows by doubling; what lies past a row's length is never attended to."""

    k: Tensor | None = None
    v: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, positions: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, L, head_dim) at positions (B, L); returns views of the first `needed` positions."""
        B, H, L, Dh = k.shape
        if self.k is None or needed > self.k.shape[2]:
            capacity = max(64, needed, 2 * self.k.shape[2] if self.k is not None else 0)
            grown_k, grown_v = k.new_zeros(B, H, capacity, Dh), v.new_zeros(B, H, capacity, Dh)
            if self.k is not None:
                grown_k[:, :, : self.k.shape[2]] = self.k
                grown_v[:, :, : self.v.shape[2]] = self.v
            self.k, self.v = grown_k, grown_v
        index = positions[:, None, :, None].expand(B, H, L, Dh)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)
        return self.k[:, :, :needed], self.v[:, :, :needed]


@dataclass
class MambaState:
    """conv (B, d_conv - 1, channels): the last inputs of the convolution; ssm (B, H, P, N): the scan's state."""

    conv: Tensor | None = None
    ssm: Tensor | None = None


class Cache:
    """One entry per block of the model, and the number of tokens (B,) each row holds so far."""

    def __init__(self, block_pattern: str, batch_size: int, device: torch.device | str = "cpu"):
        self.layers: list[KeyValues | MambaState] = [KeyValues() if b == "T" else MambaState() for b in block_pattern]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.max_length = 0  # of any row, known without asking the device

    def select(self, rows: Tensor) -> Cache:
        """A new cache holding copies of the given rows (repeats allowed: that is how a prefix is forked)."""
        new = object.__new__(Cache)
        new.layers = [type(e)(*(None if t is None else t[rows] for t in vars(e).values())) for e in self.layers]
        new.lengths = self.lengths[rows]
        new.max_length = self.max_length
        return new
