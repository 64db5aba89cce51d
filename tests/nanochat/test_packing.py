"""Packing against the obvious construction: every example once, nothing learned that should not be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch, PackedBatches, TokenData, best_fit
from nanochat.warmup import WarmupBatches, copy_example


def random_examples(count, longest, seed=0, vocabulary=500):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, vocabulary, n).tolist(), rng.integers(0, 2, n).tolist())
        for n in rng.integers(2, longest + 2, count)
    ]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


# --- best fit


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_every_item_is_in_one_row_and_no_row_overflows(capacity):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, capacity + 1, rng.integers(0, 200))
        rows = best_fit(lengths, capacity, rng)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(rows)
        assert all(lengths[row].sum() <= capacity for row in rows)


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(10, 400, 2000)
    rows = best_fit(lengths, 1000, np.random.default_rng(1))
    assert lengths.sum() / (len(rows) * 1000) > 0.99
    perfect = best_fit([6, 4, 7, 3, 5, 5], 10, np.random.default_rng(0))
    assert sorted(sorted(row) for row in perfect) == [[0, 1], [2, 3], [4, 5]]


def test_best_fit_takes_the_fullest_row_that_has_room():
    """7 and 6 open rows; 3 fits both and goes to the 7, so that the 4 still fits the 6."""
    rows = best_fit([7, 6, 4, 3], 10, np.random.default_rng(0))
    assert sorted(sorted(row) for row in rows) == [[0, 3], [1, 2]]


def test_the_number_of_rows_does_not_depend_on_the_seed_but_the_rows_do():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    packings = [best_fit(lengths, 64, np.random.default_rng(seed)) for seed in range(5)]
    assert len({len(rows) for rows in packings}) == 1
    assert len({tuple(map(tuple, rows)) for rows in packings}) == 5


def test_an_item_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="length 11 does not fit a row of 10"):
        best_fit([3, 11], 10, np.random.default_rng(0))


# --- batches


def slow_batch(examples, members, L):
    """One row of a batch, token by token."""
    tokens, targets, seq_idx = [], [], []
    for n, example in enumerate(members):
        ids, mask = examples[example]
        for at in range(len(ids) - 1):
            tokens.append(ids[at])
            targets.append(ids[at + 1] if mask[at + 1] else IGNORE)
            seq_idx.append(n)
    padding = L - len(tokens)
    return tokens + [0] * padding, targets + [IGNORE] * padding, seq_idx + [len(members)] * padding


def test_batches_equal_the_obvious_construction():
    examples, L, rows = random_examples(60, 40), 50, 3
    batches = PackedBatches(TokenData.from_examples(examples), L, rows, seed=5)
    lengths = [len(ids) - 1 for ids, _ in examples]
    packed = best_fit(lengths, L, np.random.default_rng([5, 0]))
    assert batches.rows_per_epoch == len(packed)
    assert batches.fill == pytest.approx(sum(lengths) / (len(packed) * L))
    assert batches.steps_per_epoch() == -(-len(packed) // rows)
    for step in range(len(packed) // rows):
        batch = batches.get(step)
        expected = [slow_batch(examples, packed[step * rows + r], L) for r in range(rows)]
        for got, want in zip(vars(batch).values(), zip(*expected, strict=True), strict=True):
            assert got.dtype == torch.int64
            assert got.tolist() == list(want)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = TokenData.from_examples(random_examples(40, 30))
    batches = PackedBatches(data, 32, 4, seed=1)
    steps = [0, 1, 2, 50, 51, 7, 0, 33, 2]  # back and forth over several epochs
    got = {step: batches.get(step) for step in sorted(set(steps))}
    for step in steps:
        assert same(batches.get(step), got[step])
        assert same(PackedBatches(data, 32, 4, seed=1).get(step), got[step])
    assert not same(PackedBatches(data, 32, 4, seed=2).get(0), got[0])


def test_every_epoch_holds_every_example_once_in_another_order():
    examples = [([i, i + 1000], [0, 1]) for i in range(101)]  # the first token names the example
    batches = PackedBatches(TokenData.from_examples(examples), 4, 5)
    assert (batches.rows_per_epoch, batches.steps_per_epoch()) == (26, 6)
    rows = torch.cat([batches.get(step).tokens for step in range(3 * 26 // 5 + 1)])[: 3 * 26]
    valid = torch.cat([batches.get(step).targets for step in range(3 * 26 // 5 + 1)])[: 3 * 26] != IGNORE
    epochs = [rows[e * 26 : (e + 1) * 26][valid[e * 26 : (e + 1) * 26]].tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("kind", ["packed", "warm-up"])
def test_shares_of_the_ranks_make_up_the_whole(kind):
    data = TokenData.from_examples(random_examples(50, 30))
    batches = PackedBatches(data, 32, 7, 3) if kind == "packed" else WarmupBatches(copy_example, 100, 32, 7, 3)
    for step in (0, 4):
        whole = batches.get(step)
        shares = [batches.get(step, part) for part in (range(0, 2), range(2, 3), range(3, 7))]
        for name, tensor in vars(whole).items():
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), tensor)
    assert batches.get(0, range(0)).tokens.shape == (0, 32)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        PackedBatches(TokenData.from_examples([]), 32, 4)


# --- raw text


@pytest.mark.parametrize("L", [1, 5, 16, 1000])
def test_text_predicts_every_token_but_the_first_of_each_document_once(L):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 60, 30).tolist(), 1, L, L + 1, L + 2, 2 * L + 1, 1]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.arange(sum(lengths), dtype=np.int32)  # a token's id is its place
    data = TokenData.from_text(ids, starts, L)
    batches = PackedBatches(data, L, 1)
    predicted = []
    for step in range(batches.steps_per_epoch()):
        batch = batches.get(step)
        learned = batch.targets != IGNORE
        assert torch.equal(batch.tokens[learned] + 1, batch.targets[learned])  # each from the token before it
        predicted += batch.targets[learned].tolist()
    assert sorted(predicted) == sorted(set(range(len(ids))) - set(starts.tolist()))


def test_text_without_anything_to_predict():
    assert len(TokenData.from_text(np.arange(3, dtype=np.int32), np.arange(3), 8)) == 0
