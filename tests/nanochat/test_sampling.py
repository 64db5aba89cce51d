"""Sampling against exact enumeration, and stop texts against searching the whole text."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.common import UserError
from nanochat.sampling import Sampling, TextStream, sample

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def shares(**settings):
    """How often each token is drawn: the draws are an even grid, so that nothing is left to chance."""
    n = 20_000
    rows = [Sampling(**{"temperature": 1.0, **settings})] * n
    return sample(LOGITS.expand(n, 5), rows, [(i + 0.5) / n for i in range(n)]).bincount(minlength=5) / n


def renormalised(p, kept):
    p = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0)
    return p / p.sum()


def test_temperature():
    for t in (0.5, 1.0, 2.0):
        assert (shares(temperature=t) - (LOGITS / t).softmax(-1)).abs().max() < 1e-3
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0, 0]


def test_top_k_top_p_and_min_p_keep_the_likeliest():
    p = LOGITS.softmax(-1)  # .53 .20 .07 .03 .12 (tokens 0, 1, 4, 2, 3 by rank)
    cases = [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 4}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": p[0].item() + 0.01}, {0, 1}),
        ({"top_p": p[0].item() - 0.01}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1}),
    ]
    for settings, kept in cases:
        assert (shares(**settings) - renormalised(p, kept)).abs().max() < 1e-3, settings
    # top-p counts what top-k has left, renormalised
    q = renormalised(p, {0, 1})
    assert (shares(top_k=2, top_p=q[0].item() - 0.01) - renormalised(p, {0})).abs().max() < 1e-3


def test_repetition_penalty_makes_what_was_seen_less_likely():
    row = [Sampling(repetition_penalty=3.0)]
    assert sample(LOGITS[None], row, [0.0], [[0, 3]]).item() == 1  # 2 / 3 < 1; -1 * 3 = -3
    assert sample(LOGITS[None], row, [0.0], [[1]]).item() == 0
    assert sample(-LOGITS[None] - 2, row, [0.0], [[3]]).item() == 2  # what is below 0 goes further down: -1 * 3
    assert LOGITS.tolist() == [2.0, 1.0, 0.0, -1.0, 0.5]  # the model's logits are left as they were


def test_every_row_has_its_own_settings():
    rows = [Sampling(), Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0)]
    draws = [0.0, 0.999, 0.999]
    together = sample(LOGITS.expand(3, 5), rows, draws)
    alone = [sample(LOGITS[None], [s], [d]).item() for s, d in zip(rows, draws, strict=True)]
    assert together.tolist() == alone == [0, 1, 4]  # the last token of all, where nothing was cut and sorted


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_stop_texts_are_found_wherever_tokens_are_cut(small_tokenizer):
    rng = random.Random(0)
    single = {small_tokenizer.token_bytes[i]: i for i in range(256)}
    for _ in range(300):
        text = "".join(rng.choice("aabé ") for _ in range(rng.randint(0, 12)))
        stops = ["".join(rng.choice("aabé ") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
        stream, pieces = TextStream(small_tokenizer, stops), []
        for b in text.encode():
            pieces.append(stream.feed(single[bytes([b])]))
            if stream.stopped:
                break
        pieces.append(stream.feed(None))
        found = [at for at in map(text.find, stops) if at >= 0]
        # the stream stops at the stop text that is complete first, before which an earlier one may have begun
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(at for end, at in ends if end == min(ends)[0])] if ends else text
        assert "".join(pieces) == expected == stream.text
        assert stream.stopped == bool(found)
