"""The warm-up tasks: what is learned can be known from the context, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch
from nanochat.warmup import WarmupBatches, copy_example, far_copy_example


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("L", [64, 200])
def test_what_copying_teaches_is_in_the_context(L):
    """Every learned target is the token that followed the same stretch one period ago, in the same sequence."""
    batches = WarmupBatches(copy_example, 50, L, 6, seed=1)
    for step in range(5):
        batch = batches.get(step)
        assert batch.tokens.shape == batch.targets.shape == batch.seq_idx.shape == (6, L)
        assert batch.tokens.min() >= 0 and batch.tokens.max() < 50
        assert (batch.targets != IGNORE).float().mean() > 0.3
        for tokens, targets, seq_idx in zip(batch.tokens, batch.targets, batch.seq_idx, strict=True):
            for n in seq_idx.unique():
                inside = (seq_idx == n).nonzero().flatten().tolist()
                learned = [at for at in inside if targets[at] != IGNORE]
                if not learned:
                    continue
                size = learned[0] - inside[0]  # the second copy's second token is the first that can be known
                assert 8 <= size <= 24
                assert learned == list(range(learned[0], learned[-1] + 1))
                assert len(learned) <= size - 1
                for at in learned:
                    assert tokens[inside[0] : at - size + 1].tolist() == tokens[inside[0] + size : at + 1].tolist()
                    assert targets[at] == tokens[at - size + 1]


@pytest.mark.parametrize("example", [copy_example, far_copy_example])
def test_batches_differ_by_step_row_and_seed(example):

    def make(seed: int) -> WarmupBatches:
        return WarmupBatches(example, 1000, 64, 2, seed)

    batches = make(1)
    first = batches.get(0)
    assert same(first, make(1).get(0))
    others = [batches.get(1), make(2).get(0)]
    assert not any(same(first, other) for other in others)
    assert not torch.equal(first.tokens[0], first.tokens[1])


def test_far_copies_can_be_known_from_their_first_two_tokens():
    """Of so many tokens no two are alike by chance, so a learned token has one earlier place to be read from."""
    rng = np.random.default_rng(0)
    distances = []
    for _ in range(100):
        ids, mask = far_copy_example(rng, 10_000_000)
        half = len(ids) // 2
        assert len(ids) == len(mask) and sorted(ids[:half]) == sorted(ids[half:]) and not any(mask[:half])
        for i in range(half, len(ids)):
            if mask[i]:
                at = ids.index(ids[i - 1])
                assert at < half and ids[at - 1] == ids[i - 2] and ids[at + 1] == ids[i]
                distances.append(i - at)
    assert max(distances) > 200 and np.mean(mask) > 0.3
