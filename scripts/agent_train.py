"""Teach a model when to search: it answers what it knows, searches for what it does not, and each search has a price.

    python -m scripts.agent_train configs/agent_tiny.py --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/train.jsonl
    torchrun --standalone --nproc_per_node=8 -m scripts.agent_train configs/agent_tiny.py --algorithm grpo ...

First by example (source "agent_sft"), as an oracle decides: the model as it is answers every question closed book;
where that is right the example is the answer, where it is wrong a search, what it finds, and the answer with its
citation (tasks/agent.py). Then by reward (source "agent"): real answers with real searches, worth being right less
--retrieval_price for each search (nanochat/rl/). --use_rewards false leaves the second out, --source agent_sft the
first. Beside its settings this is scripts/refrag_finetune.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from nanochat.common import compute_cleanup, print0, run_main
from nanochat.config import format_config, load_config
from nanochat.training import resolve_dtype
from scripts._searching import MOST_VAL_EXAMPLES, SearchConfig, Setup, begin, multi_hop_task, reinforce, supervise
from tasks.agent import AgentTask, oracle_decisions, policy_figures
from tasks.refrag import multi_hop_figures


@dataclass(kw_only=True)
class Config(SearchConfig):
    """Teach a model when to search."""

    source: str = "rag"
    """Checkpoint to start from: rag, mid, base, refrag; agent_sft or agent: reinforcement only."""
    closed_book_tokens: int = 32
    """Longest closed-book answer in tokens."""
    algorithm: Literal["grpo", "ppo", "weighted"] = "ppo"
    """ppo: with a critic; grpo: answers to one question are compared; weighted: each answer as likely as its reward."""
    reward_answer: float = 1.0
    """Weight of being right."""
    reward_evidence: float = 0.0
    """Weight of the share of gold documents found."""
    reward_economy: float = 0.0
    """Weight of showing few documents, where the answer is right."""
    retrieval_price: float = 0.1
    """Taken off for each search: it pays where it makes a right answer so much likelier."""


def decisions(setup: Setup) -> dict[str, bool]:
    """The oracle's, by the question's words, for all questions that examples are made of and evaluations ask; empty
    where there is no oracle."""
    config, device = setup.config, setup.compute.device
    queries = setup.val_queries[: max(MOST_VAL_EXAMPLES, config.eval_questions)]
    if setup.by_example:
        queries = setup.train_queries + queries
    if not queries:
        return {}
    if config.plan:  # without asking: searches are the longer examples
        print0("the plan takes every question for one to search for")
        return {query["query"]: True for query in queries}
    dtype = resolve_dtype(config.dtype, device)
    started = setup.meta["start"]
    needed = oracle_decisions(queries, started, device, dtype, config.closed_book_tokens, setup.compute)
    if needed is None:
        print0(f"the checkpoint that {config.source} started from is gone: its decisions are compared with nothing")
        return {}
    print0(f"oracle: search for {sum(needed):,} of {len(needed):,} questions")
    return {query["query"]: need for query, need in zip(queries, needed, strict=True)}


def score(setup: Setup, oracle: dict[str, bool], queries: list[dict], answers: list[Any]) -> dict[str, float]:
    """How good the answers are, how good the decisions, and what both are worth together."""
    needed = [oracle[query["query"]] for query in queries] if oracle else None
    rewards = [setup.rewards(query, *answer)["reward"] for query, answer in zip(queries, answers, strict=True)]
    figures = multi_hop_figures(queries, answers) | policy_figures(answers, needed)
    return figures | {"worth": sum(rewards) / len(rewards)}


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    setup = begin(config, ("agent_sft", "agent"))
    here = {"source": config.source, "model_tag": setup.start["model_tag"], "step": setup.start["step"]}
    setup.meta["start"] = here if setup.by_example else setup.start.get("start")
    oracle = decisions(setup)
    setup.score = partial(score, setup, oracle)

    def make_task(setup: Setup, queries: list[dict]) -> AgentTask:
        needed = [oracle[query["query"]] for query in queries]
        return AgentTask(queries, needed, partial(multi_hop_task, setup))

    if setup.by_example:
        supervise(setup, make_task)
    reinforce(setup, best_by="worth")
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
