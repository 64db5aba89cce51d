"""The warm-up tasks: what is learned can be known from the context, and from nothing else."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from nanochat.model.lm import IGNORE
from nanochat.packing import Batch
from nanochat.warmup import (
    Marks,
    WarmupBatches,
    copy_example,
    far_copy_example,
    recall_example,
    record_example,
)

MARKS = Marks(1000, 1001, 1002, 1003, 1004, 1005, [[1006], [1007], [1008], [1009], [1010]], [1011], [1012])


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


@pytest.mark.parametrize(
    "example",
    [
        copy_example,
        far_copy_example,
        partial(recall_example, marks=MARKS),
        partial(record_example, marks=MARKS),
    ],
)
def test_batches_differ_by_step_row_and_seed(example):

    def make(seed: int) -> WarmupBatches:
        return WarmupBatches(example, 1000, 64, 2, seed)

    batches = make(1)
    first = batches.get(0)
    assert same(first, make(1).get(0))
    others = [batches.get(1), make(2).get(0)]
    assert not any(same(first, other) for other in others)
    assert not torch.equal(first.tokens[0], first.tokens[1])


def continuations(ids: list[int], cue: list[int]) -> set[int]:
    """What follows the cue wherever it stands."""
    n = len(cue)
    return {ids[i + n] for i in range(len(ids) - n) if ids[i : i + n] == cue}


def test_far_copies_can_be_known_from_the_sequence_so_far_but_not_from_one_token():
    rng = np.random.default_rng(0)
    certain = {1: [], 2: [], 16: []}
    distances = []
    for _ in range(100):
        ids, mask = far_copy_example(rng, 1000)
        half = start = len(ids) // 2
        first = ids[:half]
        assert len(ids) == len(mask) and sorted(first) == sorted(ids[half:]) and not any(mask[:half])
        for i in range(half, len(ids)):
            if mask[i - 1] and not mask[i]:
                start = i  # of a sequence
            if mask[i]:
                for n in certain:
                    found = continuations(first, ids[max(start, i - n) : i])
                    assert ids[i] in found
                    certain[n].append(found == {ids[i]})
                distances.append(i - first.index(ids[i]))
    assert np.mean(certain[16]) > 0.97 and np.mean(certain[1]) < 0.4
    assert np.mean(certain[2]) < 0.9
    assert max(distances) > 200


def test_recall_asks_for_what_follows_a_cue_in_a_document():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(100):
        ids, mask = recall_example(rng, 1000, MARKS)
        end = ids.index(MARKS.user_start)
        documents = ids[:end].count(MARKS.doc_start)
        asked = questions(ids, mask)
        assert documents == ids.count(MARKS.doc_end) and len(asked) == 3 * documents and not any(mask[:end])
        for question, answer, learned in asked:
            assert 1 <= len(answer) <= 4 and all(learned)
            cues = [i for i in range(3, len(question) + 1) if any(holds(ids[:end], question[i - 3 : i] + answer))]
            gaps.append(len(question) - max(cues))
    assert min(gaps) == 0 and max(gaps) >= 8


def test_records_ask_for_a_value_of_the_cited_document():
    rng = np.random.default_rng(0)
    by_title, documents_seen, ambiguous = [], set(), []
    for _ in range(200):
        ids, mask = record_example(rng, 1000, MARKS)
        end = ids.index(MARKS.user_start)
        assert not any(mask[:end])
        titles, bodies = [], []
        for part in split(ids[:end], MARKS.doc_start)[1:]:
            body = part.index(MARKS.doc_body)
            titles.append(part[: body - 1])
            bodies.append(part[body + 1 : -1])
            assert part[body - 1 : body] == MARKS.numbers[len(titles) - 1] and part[-1] == MARKS.doc_end
        documents_seen.add(len(titles))
        for question, answer, learned in questions(ids, mask):
            assert answer[0:1] == MARKS.bracket and answer[2:3] == MARKS.closing and not learned[0] and all(learned[3:])
            n, value = MARKS.numbers.index(answer[1:2]), answer[3:]
            keyed = [
                [at for at in range(1, len(body)) if body[at : at + len(value)] == value and body[at - 1] in question]
                for body in bodies
            ]
            assert keyed[n], "the value follows a key of the question in the cited document"
            assert learned[1] == learned[2]
            by_title.append(learned[1])
            if learned[1]:
                assert any(holds(question, titles[n]))
            else:
                key = bodies[n][keyed[n][0] - 1]
                ambiguous.append(sum(key in body for body in bodies) == len(bodies))
    assert 0.4 < np.mean(by_title) < 0.6 and documents_seen == {1, 2, 3, 4, 5}
    assert all(ambiguous)  # every document has the key: the number alone tells which value


def split(ids: list[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == mark:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def questions(ids: list[int], mask: list[bool]) -> list[tuple[list[int], list[int], list[bool]]]:
    """The question, the answer, and which of its tokens are learned, of every turn."""
    turns = []
    for start, stop in pairwise([i for i, t in enumerate(ids) if t == MARKS.user_start] + [len(ids)]):
        closing = ids.index(MARKS.user_end, start)
        assert ids[closing + 1] == MARKS.assistant_start and not any(mask[start : closing + 2])
        turns.append((ids[start + 1 : closing], ids[closing + 2 : stop], mask[closing + 2 : stop]))
    return turns


def holds(ids: list[int], stretch: list[int]):
    return (ids[i : i + len(stretch)] == stretch for i in range(len(ids)))
