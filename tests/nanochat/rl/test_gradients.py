"""The gradients of reinforcement against a problem small enough to enumerate, and its parts against slow references."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import Compute, UserError
from nanochat.engine import Generation
from nanochat.rl.grpo import clipped_loss, group_advantages, kl_estimate
from nanochat.rl.ppo import gae, value_loss
from nanochat.rl.rollout import Rollout, RolloutBatches, Settings, look_back
from nanochat.searching import Hop

START, END, LETTERS, LENGTH = 5, 4, range(4), 3


def reward_of(letters: tuple[int, ...]) -> float:
    return (1.0 if letters[:2] == (1, 2) else 0.0) + 0.3 * letters.count(3) - (0.5 if len(letters) == LENGTH else 0.0)


def sequences():
    """All answers: letters until an end, or three letters."""
    grown: list[tuple[int, ...]] = [()]
    while grown:
        letters = grown.pop()
        if len(letters) == LENGTH:
            yield letters, False
            continue
        yield letters, True
        grown += [(*letters, letter) for letter in LETTERS]


def as_rollout(letters, ended, reward) -> Rollout:
    info = Generation(ids=list(letters), mask=[1] * len(letters), finish_reason="stop" if ended else "length")
    return Rollout({}, [START], "", info, {"reward": reward})


@pytest.fixture
def model(make_model):
    return make_model(6, pattern="MT", noise=0.2)


def batches(model, **settings) -> RolloutBatches:
    made = RolloutBatches(
        model,
        SimpleNamespace(special_id=lambda name: END),
        [{}],
        None,
        None,
        Settings(kl=0.0, queries_per_step=1, **settings),
        Compute(torch.device("cpu")),
        micro_batch=4096,
    )
    made.collected = 0
    return made


def forbid_start(model):
    """START has no probability: the enumeration leaves it out."""
    head = model.lm_head.forward
    mask = torch.zeros(6)
    mask[START] = -1e9
    model.lm_head.forward = lambda states: head(states) + mask
    return model


def exact_gradient(model) -> torch.Tensor:
    """Of the expected reward, by its definition: sum over answers of p(answer) * reward."""
    model.zero_grad()
    total, mass = 0.0, 0.0
    for letters, ended in sequences():
        tokens = torch.tensor([[START, *letters, *([END] if ended else [])]])
        logp = model.lm_head(model(tokens, states=True)[:, :-1]).float().log_softmax(-1)
        likelihood = logp[0, torch.arange(tokens.shape[1] - 1), tokens[0, 1:]].sum().exp()
        total = total + likelihood * reward_of(letters)
        mass += float(likelihood.detach())
    assert mass == pytest.approx(1, abs=1e-5)
    total.backward()
    return flat(model)


def flat(model) -> torch.Tensor:
    return torch.cat(
        [p.grad.flatten() for name, p in model.named_parameters() if "value" not in name and p.grad is not None]
    )


@torch.no_grad()
def drawn(model, count: int, seed: int, prefix: tuple[int, ...] = ()) -> list[Rollout]:
    """Answers that begin with the prefix."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[START, *prefix]]).expand(count, -1)
    for _ in range(LENGTH - len(prefix)):
        logits = model.lm_head(model(tokens, states=True)[:, -1]).float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    rollouts = []
    for row in tokens[:, 1:].tolist():
        ended = END in row
        letters = tuple(row[: row.index(END)] if ended else row)
        rollouts.append(as_rollout(letters, ended, reward_of(letters)))
    return rollouts


def estimated_gradient(model, samples: int, **settings) -> torch.Tensor:
    made = batches(model, **settings)
    model.zero_grad()
    made.rollouts = drawn(model, samples, seed=1)
    made.judge()
    made.look_back()
    model.zero_grad()
    made.loss(model, made.batch(made.rollouts)).backward()
    return -flat(model)  # the loss falls where the reward rises


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"algorithm": "grpo", "group_size": 8, "scale_advantages": False}, 0.99),
        ({"algorithm": "grpo", "group_size": 64}, 0.99),
        ({"algorithm": "grpo", "group_size": 8, "scale_advantages": False, "clip": 0.0}, 0.99),
        ({"algorithm": "grpo", "group_size": 8, "scale_advantages": False, "updates": 2}, 0.99),
        ({"algorithm": "ppo", "gae_lambda": 1.0}, 0.99),
    ],
)
def test_mean_gradient_is_that_of_the_expected_reward(model, settings, least):
    forbid_start(model)
    if settings["algorithm"] == "ppo":
        model.add_value_head()
    exact = exact_gradient(model)
    estimate = estimated_gradient(model, 16_384, **settings)
    assert torch.nn.functional.cosine_similarity(exact, estimate, dim=0) > least
    wrong = drawn(model, 4096, seed=2)  # rewards that belong to other answers point elsewhere
    made = batches(model, **settings)
    made.rollouts = [
        as_rollout(a.info.ids, a.info.finish_reason == "stop", b.reward)
        for a, b in zip(wrong, wrong[1:] + wrong[:1], strict=True)
    ]
    made.judge()
    made.look_back()
    model.zero_grad()
    made.loss(model, made.batch(made.rollouts)).backward()
    assert torch.nn.functional.cosine_similarity(exact, -flat(model), dim=0) < 0.8


def branched(model, trunks: int, group_size: int) -> list[Rollout]:
    """Groups from points of answers drawn before: their beginning, or behind one of their searches (the letter 3)."""
    chosen: dict[tuple[int, ...], list[int]] = {}
    draw = random.Random(0)
    for trunk in drawn(model, trunks, seed=4):
        points = [0, *(hop.end for hop in searches(trunk.info.ids))]
        chosen.setdefault(tuple(trunk.info.ids[: draw.choice(points)]), []).append(len(points))
    groups = []
    for number, (prefix, weights) in enumerate(chosen.items()):
        answers = drawn(model, len(weights) * group_size, 10 + number, prefix)
        for at, answer in enumerate(answers):
            answer.info.hops = searches(answer.info.ids)
            answer.begun, answer.weight = len(prefix), weights[at // group_size]
        groups += answers
    return groups


def searches(letters: Sequence[int]) -> list[Hop]:
    return [Hop("", at, end=at + 1) for at, letter in enumerate(letters[: LENGTH - 1]) if letter == 3]


def test_groups_that_branch_off_have_the_same_mean_gradient(model):
    forbid_start(model)
    exact = exact_gradient(model)
    made = batches(model, algorithm="grpo", group_size=8, scale_advantages=False, branch=True)
    made.rollouts = branched(model, 4096, 8)
    assert {rollout.begun for rollout in made.rollouts} == {0, 1, 2}
    made.judge()
    made.look_back()
    model.zero_grad()
    made.loss(model, made.batch(made.rollouts)).backward()
    assert torch.nn.functional.cosine_similarity(exact, -flat(model), dim=0) > 0.99
    for rollout in made.rollouts:  # without the weights, long answers count for less
        rollout.weight = 1.0 if rollout.weight == 1 else 0.0
    made.judge()
    model.zero_grad()
    made.loss(model, made.batch(made.rollouts)).backward()
    assert torch.nn.functional.cosine_similarity(exact, -flat(model), dim=0) < 0.98


def test_what_was_found_is_no_action(model):
    """A document in the middle of an answer: its tokens are read, and nothing is learned from them."""
    info = Generation(ids=[1, 0, 3, 3, 2], mask=[1, 1, 0, 0, 1], finish_reason="stop")
    rollout = Rollout({}, [START], "", info, {"reward": 1.0})
    made = batches(model, algorithm="weighted")
    tokens, actions = made._tokens([rollout])
    assert tokens.tolist() == [[START, 1, 0, 3, 3, 2, END]]
    assert actions.tolist() == [[True, True, False, False, True, True]]
    made.rollouts = [rollout]
    made.judge()
    made.look_back()
    logp, entropy, values = look_back(model, tokens, actions)
    assert values is None and (entropy > 0).all()
    with torch.no_grad():
        each = model(tokens)[0].log_softmax(-1)
    expected = [each[at, tokens[0, at + 1]] for at in (0, 1, 4, 5)]
    torch.testing.assert_close(logp, torch.stack(expected))
    assert made.loss(model, made.batch([rollout])).item() == pytest.approx(
        -torch.stack(expected).sum().item(), rel=1e-5
    )
    unmasked = batches(model, algorithm="weighted", mask_retrieved=False)
    assert unmasked._tokens([rollout])[1].all()


# --- the parts


def test_advantages_against_their_definition():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]])
    scaled, centred = group_advantages(rewards), group_advantages(rewards, scale=False)
    for row in range(2):
        mean = sum(rewards[row].tolist()) / 4
        deviation = (sum((r - mean) ** 2 for r in rewards[row].tolist()) / 4) ** 0.5
        for at in range(4):
            assert float(centred[row, at]) == pytest.approx(float(rewards[row, at]) - mean)
            assert float(scaled[row, at]) == pytest.approx(
                (float(rewards[row, at]) - mean) / (deviation + 1e-4), abs=1e-5
            )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.7)])
def test_gae_against_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(7), torch.randn(7)
    ahead = [*values.tolist()[1:], 0.0]
    delta = [float(rewards[t]) + gamma * ahead[t] - float(values[t]) for t in range(7)]
    expected = torch.tensor([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 7)) for t in range(7)])
    advantages, targets = gae(rewards, values, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(targets, expected + values)
    if (gamma, lam) == (1.0, 1.0):  # the whole reward to come
        torch.testing.assert_close(targets, rewards.flip(0).cumsum(0).flip(0))
    assert gae(torch.zeros(0), torch.zeros(0))[0].shape == (0,)


def test_clipping_and_divergence():
    old = torch.zeros(4)
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = clipped_loss(logp, old, advantages, 0.2)
    ratio = logp.detach().exp()
    torch.testing.assert_close(loss.detach(), -torch.tensor([1.2, -float(ratio[1]), float(ratio[2]), -0.8]))
    loss.sum().backward()
    assert logp.grad[0] == 0 and logp.grad[3] == 0 and logp.grad[1] != 0 and logp.grad[2] != 0  # no way back is cut off
    torch.manual_seed(0)
    p, q = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    expected = (p.exp() * (p - q)).sum()
    estimates = kl_estimate(p, q)
    assert (estimates >= 0).all()
    torch.testing.assert_close((p.exp() * estimates).sum(), expected)
    held = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), 0.2)
    assert float(held) == pytest.approx(0.5 * (2 - 0.2) ** 2)
    assert float(value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), 0.0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"algorithm": "grpo"}, {3, 1}),  # four as good as each other teach nothing
        ({"algorithm": "grpo", "kl": 0.1, "entropy": 0.1}, {3, 1, 4}),
        ({"algorithm": "weighted", "kl": 0.1}, {3, 1, 4}),
        ({"algorithm": "ppo", "kl": 0.1}, {3, 1, 4}),
    ],
)
def test_what_is_read_again_teaches_what_all_answers_do(model, settings, copies):
    """The same gradient, divergence and entropy as with every answer; a step of nothing has none."""
    if settings["algorithm"] == "ppo":
        model.add_value_head()
    one, other, third = drawn(model, 3, seed=3)
    assert len({tuple(r.info.ids) for r in (one, other, third)}) == 3
    rewards = [(one, 1.0)] * 3 + [(other, 0.0)] + [(third, 0.5)] * 4
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    gradients, figures = [], []
    for gather in (False, True):
        made = batches(model, group_size=4)
        made.settings = replace(made.settings, **settings)
        made.reference = reference if settings.get("kl") else None
        made.rollouts = [as_rollout(r.info.ids, r.info.finish_reason == "stop", reward) for r, reward in rewards]
        made.judge()
        if gather:
            made.gather()
            assert {r.copies for r in made.rollouts} == copies
        made.look_back()
        model.zero_grad()
        (made.loss(model, made.batch(made.rollouts, 8)) / 8).backward()
        gradients.append(flat(model))
        made.figures = {"valid": 1.0}
        figures.append(made.step_figures())
    torch.testing.assert_close(*gradients)
    if settings.get("kl"):
        assert figures[0] == pytest.approx(figures[1]) and figures[0]["kl"] > 0
    nothing = made.batch([], 6)
    assert nothing.learned == 6
    loss = made.loss(model, nothing)
    loss.backward()
    assert loss.item() == 0
    made.figures = {"valid": 1.0}
    made.step_figures()  # no entropy of no token


def test_bad_answers_may_weigh_less(model):
    rollouts = drawn(model, 2, seed=3)
    rollouts[0].parts, rollouts[1].parts = {"reward": 1.0}, {"reward": 0.0}
    for weight in (1.0, 0.25, 0.0):
        made = batches(model, algorithm="grpo", group_size=2, negative_weight=weight)
        made.rollouts = rollouts
        made.judge()
        assert rollouts[0].advantages[0].item() == pytest.approx(1, abs=1e-3)
        assert rollouts[1].advantages[0].item() == pytest.approx(-weight, abs=1e-3)


def test_a_collapsed_policy_stops_the_run(model):
    made = batches(model, min_valid=0.4, min_entropy=0.1)
    made.figures = {"valid": 0.9, "reward": 0.5}
    made._sums = {"kl": 0.0, "entropy": 5.0, "tokens": 10.0}
    assert made.step_figures()["entropy"] == 0.5
    made._sums = {"kl": 0.0, "entropy": 0.5, "tokens": 10.0}
    with pytest.raises(UserError, match=r"entropy is 0\.050, below min_entropy"):
        made.step_figures()
    made.figures["valid"] = 0.3
    with pytest.raises(UserError, match=r"valid is 0\.300"):
        made.step_figures()


def test_bad_settings():
    for wrong, reason in (
        ({"algorithm": "reinforce"}, "grpo, ppo, weighted"),
        ({"group_size": 1}, "at least 2"),
        ({"queries_per_step": 0}, "queries_per_step"),
        ({"branch": True, "algorithm": "ppo"}, "which ppo does not"),
    ):
        with pytest.raises(UserError, match=reason):
            Settings(**wrong)
