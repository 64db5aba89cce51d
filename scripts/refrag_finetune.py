"""Teach a model to search while it answers: it writes a query, reads what that finds, writes the next one or answers.

    torchrun --standalone --nproc_per_node=8 -m scripts.refrag_finetune configs/refrag_hybrid_d20.py
    python -m scripts.refrag_finetune configs/refrag_tiny.py --knowledge_base data/rag_examples/knowledge_base \
        --queries data/rag_examples/queries/multihop_train.jsonl,data/rag_examples/queries/train.jsonl

First by example (source "refrag"): conversations with the data's searches (tasks/refrag.py); loss falls on searches and
answer, never on documents. Then by reward (source "refrag_rl"): real answers with real searches, rewarded for being
right, for finding the gold documents and for showing few (nanochat/rl/). --use_rewards false leaves the second out,
--source refrag the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.common import compute_cleanup, print0, run_main
from nanochat.config import format_config, load_config
from scripts._searching import SearchConfig, begin, reinforce, supervise


@dataclass(kw_only=True)
class Config(SearchConfig):
    """Fine-tune a model to search while it answers."""

    source: str = "rag"
    """Checkpoint to start from: rag, mid or base; refrag or refrag_rl: reinforcement only."""


def main() -> None:
    config = load_config(Config)
    print0(format_config(config))
    setup = begin(config, ("refrag", "refrag_rl"))
    if setup.by_example:
        supervise(setup)
    reinforce(setup)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
