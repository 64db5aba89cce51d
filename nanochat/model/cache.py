"""What a model remembers between calls: keys and values for attention blocks, (conv, ssm) states for Mamba blocks.

Rows of a batch may have different lengths: they are padded on the right, `lengths` says how many tokens of each row
are real, and the next tokens of a row overwrite its padding. There may be room for more rows and tokens than are held,
so that rows come, move and go without copying the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeyValues:
    """k, v: (B, H_kv, capacity, head_dim). What lies past a row's length is never attended to."""

    k: Tensor | None = None
    v: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, positions: Tensor, needed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, L, head_dim) at positions (B, L), in this type if they are the first; returns views of
        the first `needed` positions."""
        B, H, L, Dh = k.shape
        if self.k is None:
            self.k, self.v = (t.new_zeros(B, H, max(64, needed), Dh, dtype=dtype) for t in (k, v))
        self.reserve(B, needed)
        index = positions[:, None, :, None].expand(B, H, L, Dh)
        self.k.scatter_(2, index, k.to(self.k.dtype))
        self.v.scatter_(2, index, v.to(self.v.dtype))
        return self.k[:, :, :needed], self.v[:, :, :needed]

    def reserve(self, rows: int, tokens: int) -> None:
        """Room for at least so many, by doubling."""
        have = self.k.shape[0], self.k.shape[2]
        if rows <= have[0] and tokens <= have[1]:
            return
        rows, tokens = (old if new <= old else max(new, 2 * old) for old, new in zip(have, (rows, tokens), strict=True))
        self.k, self.v = (_grown(t, rows, tokens) for t in (self.k, self.v))


def _grown(old: Tensor, rows: int, tokens: int) -> Tensor:
    B, H, S, Dh = old.shape
    new = old.new_empty(rows, H, tokens, Dh)
    new[:B, :, :S] = old
    new[:B, :, S:] = new[B:] = 0  # what is masked must still be a number
    return new


@dataclass
class MambaState:
    """conv (B, d_conv - 1, channels): the last inputs of the convolution; ssm (B, H, P, N): the scan's state."""

    conv: Tensor | None = None
    ssm: Tensor | None = None

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        """Without gradients in place: this may be a part of a larger batch's state."""
        conv = conv.to(ssm.dtype)
        if self.conv is None or torch.is_grad_enabled():
            self.conv, self.ssm = conv, ssm
            return
        self.conv.copy_(conv)
        if ssm is not self.ssm:
            self.ssm.copy_(ssm)

    def reserve(self, rows: int, tokens: int) -> None:
        for name, t in vars(self).items():
            if rows > len(t):
                new = t.new_empty(max(rows, 2 * len(t)), *t.shape[1:])
                new[: len(t)] = t
                setattr(self, name, new)


class Cache:
    """One entry per block of the model, and the number of tokens (B,) each row holds so far."""

    def __init__(self, block_pattern: str, batch_size: int, device: torch.device | str = "cpu"):
        self.layers: list[KeyValues | MambaState] = [KeyValues() if b == "T" else MambaState() for b in block_pattern]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.max_length = 0  # of any row, known without asking the device
        self._whole: Cache | None = None

    @classmethod
    def _of(cls, layers: list[KeyValues | MambaState], lengths: Tensor) -> Cache:
        new = object.__new__(cls)
        new.layers, new.lengths, new._whole = layers, lengths, None
        new._measure()
        return new

    def _measure(self) -> None:
        self.max_length = int(self.lengths.max()) if len(self) else 0

    def __len__(self) -> int:
        """Rows."""
        return len(self.lengths)

    def advance(self, count: int, valid: Tensor | None) -> None:
        """Every row holds `count` tokens more, or as many as `valid` (B,) says."""
        self.lengths += count if valid is None else valid
        if valid is None:
            self.max_length += count
        else:
            self._measure()
        if self._whole is not None:
            self._whole.max_length = max(self._whole.max_length, self.max_length)

    def rows(self, start: int, end: int, room: int) -> Cache:
        """These rows as a cache of their own, which reads and writes this one's: it can take `room` tokens more. Good
        until rows come or move."""
        self._reserve(len(self), int(self.lengths[start:end].max()) + room)
        layers = [type(layer)(*(t[start:end] for t in vars(layer).values())) for layer in self.layers]
        view = self._of(layers, self.lengths[start:end])
        view._whole = self
        return view

    def _reserve(self, rows: int, tokens: int) -> None:
        for layer in self.layers:
            layer.reserve(rows, tokens)

    def append(self, other: Cache) -> None:
        """Copies of another cache's rows, behind this one's."""
        old, new = len(self), len(self) + len(other)
        self._reserve(new, other.max_length)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for into, t in zip(vars(mine).values(), vars(theirs).values(), strict=True):
                if isinstance(mine, KeyValues):
                    into, t = into[:, :, : other.max_length], t[:, :, : other.max_length]
                into[old:new] = t[: len(other)]
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.max_length = max(self.max_length, other.max_length)

    def arrange(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; a row named twice is copied, one that is not named leaves. No other row
        is touched."""
        to = [i for i, row in enumerate(order) if i != row]
        moved = [order[i] for i in to]
        if moved:
            self._reserve(len(order), 0)
            into, out_of = (torch.tensor(rows, device=self.lengths.device) for rows in (to, moved))
            for layer in self.layers:
                for t in vars(layer).values():
                    if isinstance(layer, KeyValues):
                        t = t[:, :, : self.max_length]
                    t.index_copy_(0, into, t.index_select(0, out_of))
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long, device=self.lengths.device)]
        self._measure()

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

    def fork(self, times: int = 1) -> Cache:
        """A cache of `times` copies of this one's only row: what follows may differ in each."""
        if len(self) != 1:
            raise ValueError(f"only a cache of one row can be forked, this one has {len(self)}")
        return self.select(torch.zeros(times, dtype=torch.long, device=self.lengths.device))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of every row. A Mamba state cannot go back: ValueError."""
        if any(isinstance(layer, MambaState) for layer in self.layers):
            raise ValueError("a cache with Mamba states cannot be truncated; fork it before what may have to be undone")
        self.lengths = self.lengths.clamp_max(length)
        self.max_length = min(self.max_length, length)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in vars(layer).values() if t is not None)
