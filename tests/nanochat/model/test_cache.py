"""Copies, batches and shortenings of caches go on as if their rows had been read alone."""

from __future__ import annotations

import pytest
import torch


def read(model, ids, cache=None):
    cache = model.new_cache(1) if cache is None else cache
    with torch.no_grad():
        model(torch.tensor([ids]), cache=cache)
    return cache


def after(model, cache, tokens):
    """Logits (rows, V) after one more token for each row."""
    with torch.no_grad():
        return model(torch.tensor(tokens).unsqueeze(-1), cache=cache, last_only=True)


def joined(model, prompts):
    """A cache of all these rows, with room for more."""
    batch, *others = [read(model, prompt) for prompt in prompts]
    for other in others:
        batch.append(other)
    return batch


def alone(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("pattern", ["MT", "TT", "MM"])
def test_forks_differ_in_what_follows_and_leave_the_original_as_it_was(pattern, make_model):
    model = make_model(60, pattern).eval()
    ids = list(range(7, 50))
    cache = read(model, ids)
    forks = cache.fork(3)
    made = after(model, forks, [1, 2, 3])
    for row, token in zip(made, [1, 2, 3], strict=True):
        assert torch.allclose(row, alone(model, [*ids, token]), atol=1e-5)
    assert torch.allclose(after(model, cache, [5])[0], alone(model, [*ids, 5]), atol=1e-5)
    with pytest.raises(ValueError, match="one row"):
        forks.fork()


@pytest.mark.parametrize("pattern", ["MT", "TT", "MM"])
def test_joined_rows_of_different_length_go_on_as_alone(pattern, make_model):
    model = make_model(60, pattern).eval()
    prompts = [[5] * 3, list(range(59)) * 2, [9, 8, 7, 6]]
    batch = joined(model, prompts)
    for step in range(4):
        tokens = [step + 1, step + 2, step + 3]
        made = after(model, batch.rows(0, 3, 1), tokens)
        prompts = [[*p, t] for p, t in zip(prompts, tokens, strict=True)]
        for row, prompt in zip(made, prompts, strict=True):
            assert torch.allclose(row, alone(model, prompt), atol=1e-5)
    picked = batch.select(torch.tensor([2, 0]))
    made = after(model, picked, [11, 12])
    for row, prompt in zip(made, ([*prompts[2], 11], [*prompts[0], 12]), strict=True):
        assert torch.allclose(row, alone(model, prompt), atol=1e-5)
    assert picked.nbytes < batch.nbytes


@pytest.mark.parametrize("pattern", ["MT", "TT", "MM"])
@pytest.mark.parametrize(
    "order", [[0, 1, 3, 4], [4, 1], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 1, 1], [0, 0, 3, 2, 1, 0, 4, 4]]
)
def test_rows_that_leave_move_or_part_do_not_touch_the_others(pattern, order, make_model):
    model = make_model(60, pattern).eval()
    prompts = [[5] * 3, list(range(59)) * 2, [9, 8, 7, 6], [1] * 70, [3, 2]]
    batch = joined(model, prompts)
    batch.arrange(order)
    prompts = [prompts[row] for row in order]
    assert batch.lengths.tolist() == [len(prompt) for prompt in prompts]
    for step in range(3):
        tokens = [step + row for row in range(len(order))]
        made = after(model, batch.rows(0, len(order), 1), tokens)
        prompts = [[*prompt, token] for prompt, token in zip(prompts, tokens, strict=True)]
        for logits, prompt in zip(made, prompts, strict=True):
            assert torch.allclose(logits, alone(model, prompt), atol=1e-5)


@pytest.mark.parametrize("pattern", ["MT", "TT", "MM"])
def test_some_rows_go_on_while_others_stand_still(pattern, make_model):
    model = make_model(60, pattern).eval()
    prompts = [[5] * 3, list(range(59)), [9, 8, 7, 6]]
    batch = joined(model, prompts)
    for start, end in ((0, 2), (1, 3), (2, 3)):
        for token in range(40):  # through the room that there was
            view = batch.rows(start, end, 1)
            made = after(model, view, [token] * (end - start))
            for row in range(start, end):
                prompts[row].append(token)
        for row in range(start, end):
            assert torch.allclose(made[row - start], alone(model, prompts[row]), atol=1e-5)
        assert batch.lengths.tolist() == [len(prompt) for prompt in prompts]
        assert batch.max_length == max(map(len, prompts))


def test_attention_can_go_back_and_a_mamba_state_cannot(make_model):
    model = make_model(60, "TT").eval()
    cache = read(model, list(range(40)))
    cache.truncate(25)
    read(model, [50, 51], cache)
    assert torch.allclose(after(model, cache, [3])[0], alone(model, [*range(25), 50, 51, 3]), atol=1e-5)
    mixed = read(make_model(60, "MT").eval(), [1, 2, 3])
    with pytest.raises(ValueError, match="cannot be truncated"):
        mixed.truncate(2)
