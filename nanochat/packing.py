"""Token examples -> rows of max_seq_len with almost no padding -> batches.

A batch is a pure function of (seed, step), so a resumed run, or one on another number of ranks, sees the same data in
the same order without any reader state to save.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.model.lm import IGNORE


@dataclass
class Batch:
    """tokens, targets, seq_idx: (rows, L) int64. targets is IGNORE where nothing is learned."""

    tokens: Tensor
    targets: Tensor
    seq_idx: Tensor

    @property
    def learned(self) -> int:
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.seq_idx)))


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes its examples. Not to be changed: it is remembered."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def best_fit(lengths: Sequence[int], capacity: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of items grouped into rows whose lengths sum to at most capacity: best-fit decreasing, rows shuffled.

    The number of rows depends on the lengths alone; which items of equal length share a row, on rng.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an item of length {lengths.max()} does not fit a row of {capacity}")
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in order.tolist():
        n = int(lengths[item])
        at = bisect_left(open_rows, (n, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        if room > n:
            insort(open_rows, (room - n, row))
    return [rows[i] for i in rng.permutation(len(rows))]


class TokenData:
    """Examples in flat arrays: ids int32, learned (bool per token; None: every token), spans (n, 2) start and end."""

    def __init__(self, ids: np.ndarray, learned: np.ndarray | None, spans: np.ndarray):
        self.ids, self.learned, self.spans = ids, learned, spans

    @classmethod
    def from_examples(cls, examples: Iterable[tuple[Sequence[int], Sequence[int]]]) -> TokenData:
        """examples: (ids, mask) with mask 1 on tokens to be predicted."""
        ids, learned, ends = [np.zeros(0, np.int32)], [np.zeros(0, bool)], [0]
        for tokens, mask in examples:
            ids.append(np.asarray(tokens, dtype=np.int32))
            learned.append(np.asarray(mask, dtype=bool))
            ends.append(ends[-1] + len(tokens))
        return cls(np.concatenate(ids), np.concatenate(learned), np.stack([ends[:-1], ends[1:]], axis=1))

    @classmethod
    def from_text(cls, ids: np.ndarray, starts: np.ndarray, max_seq_len: int) -> TokenData:
        """Documents, which begin at `starts` in ids, cut into pieces of at most max_seq_len predictions. Neighbouring
        pieces share one token, so that every token of a document but its first is predicted once."""
        spans = [
            (s, min(s + max_seq_len + 1, end))
            for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True)
            for s in range(start, end - 1, max_seq_len)
        ]
        return cls(ids, None, np.asarray(spans, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.spans)


class PackedBatches:
    """Rows of `data` for every step. An example of n tokens takes n - 1 positions: inputs ids[:-1], targets ids[1:]."""

    def __init__(self, data: TokenData, max_seq_len: int, rows_per_step: int, seed: int = 0):
        if not len(data):
            raise ValueError("no examples to train on")
        self.data, self.max_seq_len, self.rows_per_step, self.seed = data, max_seq_len, rows_per_step, seed
        self.lengths = data.spans[:, 1] - data.spans[:, 0] - 1
        self._epoch, self._rows = 0, self._pack(0)
        self.rows_per_epoch = len(self._rows)
        self.fill = float(self.lengths.sum()) / (self.rows_per_epoch * max_seq_len)  # share of positions in use

    def _pack(self, epoch: int) -> list[list[int]]:
        return best_fit(self.lengths, self.max_seq_len, np.random.default_rng([self.seed, epoch]))

    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.rows_per_step)

    def _row(self, index: int) -> list[int]:
        epoch, at = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._pack(epoch)
        return self._rows[at]

    def examples(self, step: int) -> list[int]:
        """Numbers, in the data's order, of the examples in the step's batch."""
        rows = range(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        return [example for row in rows for example in self._row(row)]

    def get(self, step: int, which: range | None = None) -> Batch:
        """The rows `which` (default all) of the step's global batch."""
        which = range(self.rows_per_step) if which is None else which
        L = self.max_seq_len
        tokens = np.zeros((len(which), L), np.int64)
        targets = np.full((len(which), L), IGNORE, np.int64)
        seq_idx = np.zeros((len(which), L), np.int64)
        for r, row in enumerate(which):
            at = 0
            members = self._row(step * self.rows_per_step + row)
            for n, example in enumerate(members):
                start, end = self.data.spans[example]
                ids = self.data.ids[start:end]
                size = len(ids) - 1
                tokens[r, at : at + size] = ids[:-1]
                if self.data.learned is None:
                    targets[r, at : at + size] = ids[1:]
                else:
                    targets[r, at : at + size] = np.where(self.data.learned[start + 1 : end], ids[1:], IGNORE)
                seq_idx[r, at : at + size] = n
                at += size
            seq_idx[r, at:] = len(members)  # padding is a document of its own
        return Batch(*(torch.from_numpy(a) for a in (tokens, targets, seq_idx)))
