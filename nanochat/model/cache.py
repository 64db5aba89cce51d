"""What a model remembers between calls: keys and values for attention blocks, (conv, ssm) states for Mamba blocks.

Rows of a batch may have different lengths: they are padded on the right, `lengths` says how many tokens of each row
are real, and the next tokens of a row overwrite its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
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
            self.k, self.v = (_grown(old, new, capacity) for old, new in ((self.k, k), (self.v, v)))
        index = positions[:, None, :, None].expand(B, H, L, Dh)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)
        return self.k[:, :, :needed], self.v[:, :, :needed]


def _grown(old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
    B, H, _, Dh = like.shape
    grown = like.new_zeros(B, H, capacity, Dh)
    if old is not None:
        grown[:, :, : old.shape[2]] = old
    return grown


def _closed(t: Tensor, holes: list[int], movers: list[int]) -> Tensor:
    if holes:
        t[holes] = t[movers]
    return t


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

    @classmethod
    def _of(cls, layers: list[KeyValues | MambaState], lengths: Tensor) -> Cache:
        new = object.__new__(cls)
        new.layers, new.lengths = layers, lengths
        new.max_length = int(lengths.max()) if len(lengths) else 0
        return new

    def select(self, rows: Tensor) -> Cache:
        """A new cache holding copies of the given rows, with little more room than they need."""
        new = self._of([], self.lengths[rows])
        room = 64 * (new.max_length // 64 + 1)
        for layer in self.layers:
            held = vars(layer).values()
            if isinstance(layer, KeyValues):
                held = (None if t is None else t[rows, :, :room] for t in held)
            else:
                held = (None if t is None else t[rows] for t in held)
            new.layers.append(type(layer)(*held))
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Let these rows go, in place: rows from the end take theirs, so that as much is copied as leaves, where select
        copies all that stays. Returns the rows that are left, in their new order."""
        gone, B = set(rows), len(self.lengths)
        left = B - len(gone)
        holes = sorted(row for row in gone if row < left)
        movers = [row for row in range(left, B) if row not in gone]
        for layer in self.layers:
            for name, t in vars(layer).items():
                if t is not None:
                    setattr(layer, name, _closed(t, holes, movers)[:left])
        self.lengths = _closed(self.lengths, holes, movers)[:left]
        self.max_length = int(self.lengths.max()) if left else 0
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        return order

    def fork(self, times: int = 1) -> Cache:
        """A cache of `times` copies of this one's only row: what follows may differ in each."""
        if len(self.lengths) != 1:
            raise ValueError(f"only a cache of one row can be forked, this one has {len(self.lengths)}")
        return self.select(torch.zeros(times, dtype=torch.long, device=self.lengths.device))

    @classmethod
    def join(cls, caches: Sequence[Cache]) -> Cache:
        """One batch of the rows of several caches (all of which have read something)."""
        lengths = torch.cat([c.lengths for c in caches])
        capacity = max(c.max_length for c in caches)
        layers: list[KeyValues | MambaState] = []
        for parts in zip(*(c.layers for c in caches), strict=True):
            kind = type(parts[0])
            held = [list(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)]
            if kind is KeyValues:
                held = [[_grown(t[:, :, :capacity], t, max(64, capacity)) for t in tensors] for tensors in held]
            layers.append(kind(*(torch.cat(tensors) for tensors in held)))
        return cls._of(layers, lengths)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of every row. A Mamba state cannot go back: ValueError."""
        if any(isinstance(layer, MambaState) for layer in self.layers):
            raise ValueError("a cache with Mamba states cannot be truncated; fork it before what may have to be undone")
        self.lengths = self.lengths.clamp_max(length)
        self.max_length = min(self.max_length, length)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in vars(layer).values() if t is not None)
