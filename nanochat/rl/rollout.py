"""Answers with real searches, rewarded, as batches for the training loop.

A step draws questions, answers each several times with the model as it is, searching the real retriever, and learns
from the rewards. What a batch holds is fixed by seed and step, given the model, so a killed run goes on as if it had
never been killed.

    B answers, L tokens of the longest (prompt and answer), T written tokens of all
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Compute, UserError, atomic_write_text
from nanochat.conversation import render_prompt
from nanochat.engine import Engine, Generation
from nanochat.model.lm import HybridLM
from nanochat.packing import shuffled
from nanochat.rl.grpo import clipped_loss, group_advantages, kl_estimate
from nanochat.rl.ppo import gae, value_loss
from nanochat.rl.rewards import Rewards
from nanochat.sampling import Sampling
from nanochat.searching import Request, Searching
from nanochat.tokenizer import Tokenizer
from nanochat.training import autocast

ALGORITHMS = ("grpo", "ppo", "weighted")
ROWS = 128  # answers that are written together, at least


@dataclass(kw_only=True)
class Settings:
    """Of reinforcement; a script's config inherits them."""

    algorithm: Literal["grpo", "ppo", "weighted"] = "grpo"
    """grpo: answers to one question are compared; ppo: with a critic; weighted: each answer as likely as its reward."""
    group_size: int = 5
    """Answers to each question."""
    queries_per_step: int = 16
    """Questions of one step, over all devices."""
    updates: int = 1
    """Optimizer steps on the same answers."""
    clip: float = 0.2
    """How far from 1 the ratio to the policy that wrote the answers counts; 0: not clipped."""
    kl: float = 0.001
    """Weight of the KL divergence from the model that the run began with; 0: none, and no second model in memory."""
    entropy: float = 0.0
    """Weight of the entropy, as a bonus."""
    scale_advantages: bool = True
    """grpo: divide by the group's standard deviation."""
    negative_weight: float = 1.0
    """Weight of answers worse than their group's mean (ppo: of tokens worse than expected). Below 1, larger steps hold:
    pulling a good answer up ends where it is certain, pushing a bad one down ends nowhere (Arnal et al. 2025, arXiv
    2506.20520)."""
    branch: bool = False
    """grpo: each group goes on from a point of an answer drawn before, its beginning or behind one of its searches, and
    learns what is written up to the next search: what came before is the same for all and judged by its own groups
    (answers from intermediate states, as in VinePPO, Kazemnejad et al. 2024, arXiv 2410.01679)."""
    gae_lambda: float = 1.0
    """ppo: 1 takes the whole reward, 0 the critic's next value."""
    value_weight: float = 0.5
    """ppo: weight of the critic's loss."""
    mask_retrieved: bool = True
    """False: learn from the documents' tokens as if the model had written them (an ablation, it is wrong)."""
    min_valid: float = 0.3
    """The run stops when the share of well-formed answers falls below this."""
    min_entropy: float = 0.0
    """The run stops when the mean entropy of a token (nats) falls below this."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"algorithm is {self.algorithm!r}; it must be one of {', '.join(ALGORITHMS)}")
        if self.algorithm == "grpo" and self.group_size < 2:
            raise UserError(f"group_size is {self.group_size}; grpo compares at least 2 answers to a question")
        if self.branch and self.algorithm != "grpo":
            raise UserError(f"branch compares answers that go on from one point, which {self.algorithm} does not")
        for name in ("group_size", "queries_per_step", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class Rollout:
    """One answer: its tokens, which of them were written, and what it was worth."""

    query: dict[str, Any]
    prompt: list[int]
    text: str
    info: Generation
    parts: dict[str, float]
    begun: int = 0  # tokens of the answer that were there when its group branched off
    weight: float = 1.0  # points that its group's could have been instead, all as likely
    copies: int = 1  # answers of the step that are this one
    advantages: Tensor | None = None  # (T_i,), as are the others
    old: Tensor | None = None  # log-probabilities when it was written
    reference: Tensor | None = None
    values: Tensor | None = None
    targets: Tensor | None = None  # of the critic

    @property
    def reward(self) -> float:
        return self.parts["reward"]


@dataclass
class RolloutBatch:
    """tokens (B, L); actions (B, L - 1): whether the next token is one to learn from. The others (T,), in row order."""

    learned: int  # answers that losses are divided by, those that teach nothing and are not here too
    tokens: Tensor
    actions: Tensor
    copies: Tensor  # answers that the token stands for
    advantages: Tensor
    old: Tensor | None = None  # None: these answers are of the model as it is
    reference: Tensor | None = None
    values: Tensor | None = None
    targets: Tensor | None = None

    def to(self, device: torch.device) -> RolloutBatch:
        tensors = [value for name, value in vars(self).items() if name != "learned"]
        return RolloutBatch(self.learned, *(None if t is None else t.to(device) for t in tensors))


def look_back(
    model: HybridLM, tokens: Tensor, actions: Tensor, learn_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(T,) log-probabilities of the tokens that were taken, entropies (with a gradient if learn_entropy: it keeps two
    more arrays of (T, vocabulary) in memory), and values if the model has a critic."""
    states = model(tokens, states=True)[:, :-1][actions]
    logp = model.lm_head(states).float().log_softmax(-1)
    taken = logp.gather(-1, tokens[:, 1:][actions].unsqueeze(-1)).squeeze(-1)
    values = None
    if model.value_head is not None:  # the critic reads the policy's states and does not pull at them
        values = model.value_head(states.detach()).float().squeeze(-1)
    all_of_them = logp if learn_entropy else logp.detach()
    return taken, -(all_of_them.exp() * all_of_them).sum(-1), values


class RolloutBatches:
    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        queries: Sequence[dict[str, Any]],
        searching: Searching,
        rewards: Rewards,
        settings: Settings,
        compute: Compute,
        reference: HybridLM | None = None,
        *,
        max_tokens: int = 128,
        micro_batch: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        log: Path | None = None,
    ):
        """reference: the model that the KL divergence is from. log: a file for some answers of each step, readable."""
        if settings.queries_per_step % compute.world_size:
            raise UserError(
                f"queries_per_step {settings.queries_per_step} do not divide among {compute.world_size} devices"
            )
        self.model, self.tokenizer, self.queries = model, tokenizer, list(queries)
        self.searching, self.rewards, self.settings, self.compute = searching, rewards, settings, compute
        self.reference = reference if settings.kl > 0 else None
        self.max_tokens, self.micro_batch, self.dtype, self.seed, self.log = max_tokens, micro_batch, dtype, seed, log
        self.rows_per_step = settings.queries_per_step * settings.group_size
        self.max_seq_len = max_tokens  # of a row, as the log counts tokens
        self.collected = -1
        self.rollouts: list[Rollout] = []
        self.first_row = 0
        self.figures: dict[str, float] = {}
        self._sums = {"kl": 0.0, "entropy": 0.0, "tokens": 0.0}
        self._logging = False

    # --- what the training loop asks for

    def get(self, step: int, which: range | None = None) -> RolloutBatch:
        """The answers of these rows; all of a step are written when the first is asked for."""
        if step // self.settings.updates != self.collected:
            self.collect(step // self.settings.updates)
        which = which or range(self.rows_per_step)
        return self.batch(self.rollouts[which.start - self.first_row : which.stop - self.first_row], len(which))

    def loss(self, model: HybridLM, batch: RolloutBatch) -> Tensor:
        s = self.settings
        if not len(batch.tokens):  # nothing to learn: no gradient, but a loss like others
            return 0.0 * model.norm.weight.sum()
        logp, entropy, values = look_back(model, batch.tokens, batch.actions, learn_entropy=s.entropy != 0)
        old = logp.detach() if batch.old is None else batch.old
        if s.algorithm == "weighted":
            losses = -batch.advantages * logp
        else:
            losses = clipped_loss(logp, old, batch.advantages, s.clip)
        if batch.reference is not None:
            divergence = kl_estimate(logp, batch.reference)
            losses = losses + s.kl * divergence
            self._sums["kl"] += float(batch.copies @ divergence.detach())
        if s.algorithm == "ppo":
            losses = losses + s.value_weight * value_loss(values, batch.values, batch.targets, s.clip)
        if s.entropy:
            losses = losses - s.entropy * entropy
        self._sums["entropy"] += float(batch.copies @ entropy.detach())
        self._sums["tokens"] += float(batch.copies.sum())
        return batch.copies @ losses

    def step_figures(self) -> dict[str, float]:
        """What the last step was like; stops the run if the policy has collapsed."""
        sums = dict(zip(self._sums, self._over_ranks(list(self._sums.values())), strict=True))
        self._sums = dict.fromkeys(self._sums, 0.0)
        figures = dict(self.figures)
        if tokens := sums["tokens"]:  # none: no answer was better or worse than the others
            figures["entropy"] = sums["entropy"] / tokens
            if self.reference is not None:
                figures["kl"] = sums["kl"] / tokens
        for name, bound in (("valid", self.settings.min_valid), ("entropy", self.settings.min_entropy)):
            if figures.get(name, math.inf) < bound:
                raise UserError(
                    f"the policy has collapsed: {name} is {figures[name]:.3f}, below min_{name} {bound}; stopped "
                    "before the update. Lower its learning rate (--rl_lr_frac) or raise --kl; the best checkpoint is "
                    "kept"
                )
        return figures

    # --- answers

    def collect(self, iteration: int) -> None:
        s, compute = self.settings, self.compute
        share = s.queries_per_step // compute.world_size
        own = range(compute.rank * share, (compute.rank + 1) * share)
        self.first_row = own.start * s.group_size
        asked = self._questions(iteration, own)
        requests = [self._request(query, f"{iteration}/{place}") for place, query in zip(own, asked, strict=True)]
        weights = [1.0] * len(requests)
        points = [0] * len(requests)
        if s.branch:
            self._write(requests)
            for at, (place, request) in enumerate(zip(own, requests, strict=True)):
                # each point is as likely, so that of a long answer stands for more
                weights[at] = len(request.hops) + 1
                points[at] = random.Random(f"{self.seed}/{iteration}/{place}").randrange(len(request.hops) + 1)
        groups = [
            request.branch(point, self._sampling(f"{iteration}/{place}/{copy}"))
            for place, request, point in zip(own, requests, points, strict=True)
            for copy in range(s.group_size)
        ]
        begun = [len(request.ids) for request in groups]
        self._write(groups)
        self.rollouts = []
        for at, request in enumerate(groups):
            info, query, text = Generation.of(request), asked[at // s.group_size], request.answer
            parts, weight = self.rewards(query, text, info), weights[at // s.group_size]
            self.rollouts.append(Rollout(query, request.prompt, text, info, parts, begun[at], weight))
        self.judge()
        self._count()
        if self.log is not None and compute.is_main:
            self._write_log(iteration)
        self.gather()
        self.look_back()
        self.model.train()
        self.collected = iteration

    def gather(self) -> None:
        """What has to be read again: equal answers of a group once, those that teach nothing not at all."""
        s = self.settings
        if s.algorithm != "ppo" and not s.kl and not s.entropy:  # as good as all others of their group
            self.rollouts = [rollout for rollout in self.rollouts if rollout.advantages.any()]
        kept: dict[Any, Rollout] = {}
        for rollout in self.rollouts:
            worth = rollout.advantages[:1].tolist()
            same = (*rollout.prompt, *rollout.info.ids), rollout.info.finish_reason, rollout.begun, *worth
            if kept.setdefault(same, rollout) is not rollout:
                kept[same].copies += 1
        self.rollouts = sorted(kept.values(), key=lambda r: len(r.prompt) + len(r.info.ids))  # little padding

    def _request(self, query: dict[str, Any], seed: str) -> Request:
        prompt = render_prompt({"messages": [{"role": "user", "content": query["query"]}]}, self.tokenizer)
        return Request(prompt, self._sampling(seed), self.tokenizer, self.searching)

    def _sampling(self, seed: str) -> Sampling:
        number = random.Random(f"{self.seed}/{seed}").getrandbits(48)
        return Sampling(max_tokens=self.max_tokens, temperature=1.0, seed=number)

    def _write(self, requests: Sequence[Request]) -> None:
        with torch.inference_mode(), autocast(self.model.device, self.dtype):
            Engine(self.model, self.tokenizer).run(requests, max(ROWS, self.micro_batch))

    def _questions(self, iteration: int, places: range) -> list[dict[str, Any]]:
        chosen = []
        for place in places:
            epoch, at = divmod(iteration * self.settings.queries_per_step + place, len(self.queries))
            chosen.append(self.queries[shuffled(len(self.queries), self.seed, epoch)[at]])
        return chosen

    @torch.no_grad()
    def look_back(self) -> None:
        """Log-probabilities and values as they are now, before any update, where they will be needed; and what the
        critic makes of the rewards."""
        s = self.settings
        own = s.updates > 1 or s.algorithm == "ppo"
        if not own and self.reference is None:
            return
        for start in range(0, len(self.rollouts), self.micro_batch):
            some = self.rollouts[start : start + self.micro_batch]
            tokens, actions = (t.to(self.model.device) for t in self._tokens(some))
            sizes = actions.sum(1).tolist()
            with autocast(self.model.device, self.dtype):
                old, _, values = look_back(self.model, tokens, actions) if own else (None, None, None)
                reference = look_back(self.reference, tokens, actions)[0] if self.reference is not None else None
            for name, flat in (("old", old), ("values", values), ("reference", reference)):
                if flat is not None:
                    for rollout, part in zip(some, flat.cpu().split(sizes), strict=True):
                        setattr(rollout, name, part)
        if s.algorithm == "ppo":
            self._criticise()

    def _criticise(self) -> None:
        for rollout in self.rollouts:
            arriving = torch.zeros_like(rollout.values)
            if len(arriving):
                arriving[-1] = rollout.reward
            rollout.advantages, rollout.targets = gae(arriving, rollout.values, 1.0, self.settings.gae_lambda)
        together = torch.cat([r.advantages.repeat(r.copies) for r in self.rollouts])
        # of all ranks, so that several learn what one does
        total, count = self._over_ranks([float(together.sum()), float(len(together))])
        mean = total / count
        deviation = math.sqrt(self._over_ranks([float((together - mean).square().sum())])[0] / count)
        for rollout in self.rollouts:
            rollout.advantages = self._weighed((rollout.advantages - mean) / (deviation + 1e-4))

    def _weighed(self, advantages: Tensor) -> Tensor:
        return torch.where(advantages < 0, self.settings.negative_weight * advantages, advantages)

    def judge(self) -> None:
        """One advantage for all tokens that an answer learns, from the rewards; those of a group stand together."""
        s = self.settings
        rewards = torch.tensor([rollout.reward for rollout in self.rollouts])
        if s.algorithm == "grpo":
            rewards = self._weighed(group_advantages(rewards.view(-1, s.group_size), s.scale_advantages).flatten())
        else:
            rewards = rewards.clamp_min(0.0)
        for rollout, worth in zip(self.rollouts, rewards.tolist(), strict=True):
            rollout.advantages = torch.full((sum(self._taken(rollout)),), worth * rollout.weight)

    def _tokens(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
        """tokens (B, L) and actions (B, L - 1)."""
        rows = [rollout.prompt + rollout.info.ids + self._ending(rollout) for rollout in rollouts]
        longest = max(map(len, rows), default=1)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        actions = torch.zeros(len(rows), longest, dtype=torch.bool)
        for at, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
            tokens[at, : len(row)] = torch.tensor(row)
            taken, start = self._taken(rollout), len(rollout.prompt)
            actions[at, start : start + len(taken)] = torch.tensor(taken, dtype=torch.bool)
        return tokens, actions[:, 1:]

    def _taken(self, rollout: Rollout) -> list[int]:
        """1 for each token behind the prompt that is an action to learn from."""
        written = rollout.info.mask if self.settings.mask_retrieved else [1] * len(rollout.info.ids)
        taken = [*written, *[1] * len(self._ending(rollout))]
        if self.settings.branch:
            ends = (hop.end for hop in rollout.info.hops if hop.start >= rollout.begun)
            end = next(ends, 0) or len(taken)  # what the next search found ends there; without one, the answer
            taken = [int(one and rollout.begun <= at < end) for at, one in enumerate(taken)]
        return taken

    def _ending(self, rollout: Rollout) -> list[int]:
        """The end of the message is an action like others, where the model took it."""
        ended = rollout.info.finish_reason == "stop"
        return [self.tokenizer.special_id("<|assistant_end|>")] if ended else []

    def batch(self, rollouts: Sequence[Rollout], learned: int | None = None) -> RolloutBatch:
        tokens, actions = self._tokens(rollouts)
        copies = torch.tensor([float(r.copies) for r in rollouts]).repeat_interleave(actions.sum(1))
        flat: dict[str, Tensor | None] = {}
        for name in ("old", "advantages", "reference", "values", "targets"):
            parts = [part for rollout in rollouts if (part := getattr(rollout, name)) is not None]
            flat[name] = torch.cat(parts) if parts else None
        return RolloutBatch(len(rollouts) if learned is None else learned, tokens, actions, copies, **flat)

    # --- what it was like

    def _count(self) -> None:
        rows = [
            {
                **rollout.parts,
                "searches": float(len(rollout.info.hops)),
                "documents": float(sum(len(hop.documents) for hop in rollout.info.hops)),
                "length": float(sum(rollout.info.mask)),
            }
            for rollout in self.rollouts
        ]
        *sums, count = self._over_ranks([sum(row[name] for row in rows) for name in rows[0]] + [float(len(rows))])
        self.figures = {name: total / count for name, total in zip(rows[0], sums, strict=True)}

    def _over_ranks(self, values: list[float]) -> list[float]:
        """Their sums, so that all ranks see the same and stop together."""
        if self.compute.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float32, device=self.compute.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _write_log(self, iteration: int, count: int = 4) -> None:
        if not self._logging and self.log.exists():  # a resumed run writes these steps again
            lines = self.log.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] < iteration]
            atomic_write_text(self.log, "".join(line + "\n" for line in kept))
        self._logging = True
        with open(self.log, "a", encoding="utf-8") as file:
            for rollout in self.rollouts[:: max(1, len(self.rollouts) // count)][:count]:
                record = {
                    "iteration": iteration,
                    "query": rollout.query["query"],
                    "answers": rollout.query["answers"],
                    "written": _readable(rollout),
                    **rollout.parts,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _readable(rollout: Rollout) -> list[str]:
    content = rollout.info.message["content"]
    lines = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "documents":
            lines.append("found: " + "; ".join(document["title"] for document in part["documents"]))
        else:
            lines.append(f"search: {part['query']}" if part["type"] == "search" else f"says: {part['text']}")
    return lines
