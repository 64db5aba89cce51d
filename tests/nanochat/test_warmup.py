"""The warm-up tasks: what is learned can be known from the context, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch
from nanochat.warmup import WarmupBatches, copy_example, recall_example


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


@pytest.mark.parametrize("example", [copy_example, recall_example])
def test_batches_differ_by_step_row_and_seed(example):

    def make(seed: int) -> WarmupBatches:
        return WarmupBatches(example, 1000, 64, 2, seed)

    batches = make(1)
    first = batches.get(0)
    assert same(first, make(1).get(0))
    others = [batches.get(1), make(2).get(0)]
    assert not any(same(first, other) for other in others)
    assert not torch.equal(first.tokens[0], first.tokens[1])


def test_recall_asks_what_its_records_say():
    """Read the records back from the tokens, slowly, and answer every question from them."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids, mask = recall_example(rng, 10_000_000)  # so many tokens that no two marks or attributes are alike
        assert len(ids) == len(mask) and not mask[0] and mask[-1]
        record_mark, value_mark = ids[0], ids[-1]
        answers = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]  # where each begins
        attributes = {ids[i - 1] for i in answers}
        first_question = max(i for i in range(answers[0]) if ids[i] == value_mark) + 1
        records: dict[tuple, dict] = {}
        at = 0
        while at < first_question:
            if ids[at] == record_mark:
                start = at + 1
                at = next(i for i in range(start, first_question) if ids[i] in attributes)
                name = tuple(ids[start:at])
                assert 2 <= len(name) <= 5
                fields = records.setdefault(name, {})
            end = ids.index(value_mark, at)
            fields.setdefault(ids[at], ids[at + 1 : end])
            at = end + 1
        assert 2 <= len(records) <= 8 and all(set(fields) == attributes for fields in records.values())
        assert len(answers) == len(records) * len(attributes)  # everything is asked once
        for i in answers:
            start = max(j for j in range(i) if ids[j] == value_mark) + 1
            end = ids.index(value_mark, i)
            assert records[tuple(ids[start + 1 : i - 1])][ids[i - 1]] == ids[i:end]
            assert all(mask[i : end + 1]) and not any(mask[start:i])
