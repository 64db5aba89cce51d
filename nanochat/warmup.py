"""Warm-up tasks for very small models: batches of random tokens that teach looking things up, before there is text.

Small models do not find in-context lookup by themselves: on text, the loss of a model of a million parameters stays at
guessing for thousands of steps. A few hundred steps of copying build the attention pattern it starts from (an induction
head: Olsson et al. 2022, arXiv 2209.11895), and a few hundred of recall what reading documents needs on top: finding
the record that a name belongs to, and in it the value of one attribute (multi-query associative recall: Arora et al.
2023, arXiv 2312.04927, here with keys of two parts).
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


def recall_example(rng: np.random.Generator, vocab_size: int) -> Example:
    """2 to 8 records, then questions about them.

    A record is a name of 2 to 5 tokens and 3 to 6 attributes in random order, each with a value of 1 to 4 tokens. All
    records of an example have the same attributes, and their names are made of the same few tokens, so that neither a
    part of a name nor an attribute alone tells the answer. A question is a name and an attribute; its value, and the
    mark after it, are learned.
    """

    def draw(n: int) -> list[int]:
        return rng.integers(0, vocab_size, n).tolist()

    record_mark, question_mark, value_mark = draw(3)
    records, attributes, pool = int(rng.integers(2, 9)), draw(int(rng.integers(3, 7))), draw(12)
    names = [rng.choice(pool, int(rng.integers(2, 6))).tolist() for _ in range(records)]
    values = {(r, a): draw(int(rng.integers(1, 5))) for r in range(records) for a in range(len(attributes))}
    ids: list[int] = []
    for r, name in enumerate(names):
        ids += [record_mark, *name]
        for a in rng.permutation(len(attributes)).tolist():
            ids += [attributes[a], *values[r, a], value_mark]
    mask = [False] * len(ids)
    for r, a in rng.permutation(list(values)).tolist():
        if names.count(names[r]) > 1:
            continue  # two records of one name: the question has no single answer
        question, answer = [question_mark, *names[r], attributes[a]], [*values[r, a], value_mark]
        ids += question + answer
        mask += [False] * len(question) + [True] * len(answer)
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
