"""Warm-up tasks for very small models: batches of random tokens that teach looking things up, before there is text.

Small models do not find in-context lookup by themselves: on text, the loss of a model of a million parameters stays at
guessing for thousands of steps. A few hundred steps of copying build the attention pattern it starts from (an induction
head: Olsson et al. 2022, arXiv 2209.11895), first from neighbours, then from far away.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch

Example = tuple[list[int], list[bool]]  # tokens, and for each whether it is learned; the first never is


def copy_example(rng: np.random.Generator, vocab_size: int) -> Example:
    """A random sequence of 8 to 24 tokens written twice; the second copy is learned, but for its first token."""
    ids = rng.integers(0, vocab_size, int(rng.integers(8, 25))).tolist()
    return ids * 2, [False] * (len(ids) + 1) + [True] * (len(ids) - 1)


def far_copy_example(rng: np.random.Generator, vocab_size: int) -> Example:
    """1 to 12 random sequences of 6 to 16 tokens, then all of them again in another order.

    In the second copies all but the first two tokens are learned: those say which sequence comes. Copying learned on
    neighbours alone matches at short distances only; a name in a question is hundreds of tokens from its document.
    """
    number = int(rng.choice([1, 2, 3, 4, 6, 8, 12]))
    first = [rng.integers(0, vocab_size, int(rng.integers(6, 17))).tolist() for _ in range(number)]
    again = [first[i] for i in rng.permutation(number).tolist()]
    ids = [token for sequence in first + again for token in sequence]
    mask = [False] * (len(ids) // 2)
    for sequence in again:
        mask += [False, False] + [True] * (len(sequence) - 2)
    return ids, mask


class WarmupBatches:
    """Rows filled with random examples; a batch is a pure function of (seed, step). vocab_size: tokens to draw from."""

    def __init__(
        self,
        example: Callable[[np.random.Generator, int], Example],
        vocab_size: int,
        max_seq_len: int,
        rows_per_step: int,
        seed: int = 0,
    ):
        self.example, self.vocab_size = example, vocab_size
        self.max_seq_len, self.rows_per_step, self.seed = max_seq_len, rows_per_step, seed

    def get(self, step: int, which: range | None = None) -> Batch:
        which = range(self.rows_per_step) if which is None else which
        size = self.max_seq_len + 1
        tokens = np.zeros((len(which), size), np.int64)
        learned = np.zeros((len(which), size), bool)
        seq_idx = np.zeros((len(which), size), np.int64)
        for r, row in enumerate(which):
            at = n = 0
            rng = np.random.default_rng([self.seed, step, row])
            while at < size:
                ids, mask = self.example(rng, self.vocab_size)
                end = min(at + len(ids), size)
                tokens[r, at:end], learned[r, at:end], seq_idx[r, at:end] = ids[: end - at], mask[: end - at], n
                at, n = end, n + 1
        targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORE)
        return Batch(*(torch.from_numpy(a) for a in (tokens[:, :-1].copy(), targets, seq_idx[:, :-1].copy())))
