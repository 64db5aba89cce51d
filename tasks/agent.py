"""When to search: what a model knows closed book is answered directly, and the rest is searched for.

    said = closed_book(engine, queries)
    task = AgentTask(queries, search_needed(queries, said), partial(MultiHopRAGTask, manager=manager))

The decisions are an oracle's: it has the answers. A model learns them by example (scripts/agent_train.py), from what
questions it can answer looks like, and its own decisions are measured against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import checkpoint_root, list_steps, load_checkpoint
from nanochat.common import Compute, print0
from nanochat.engine import Engine, Generation
from nanochat.metrics import ABSTENTION, exact_match, search_decisions, stated_answer
from nanochat.retrieval import Document
from nanochat.searching import Searching
from nanochat.training import autocast
from tasks.common import Conversation
from tasks.refrag import MultiHopRAGTask


def _nothing(queries: list[str], top_k: int) -> list[list[Document]]:
    return [[] for _ in queries]


def closed_book(
    engine: Engine,
    queries: Sequence[dict[str, Any]],
    max_tokens: int = 32,
    batch_size: int = 32,
    compute: Compute | None = None,
) -> list[str]:
    """What the model says without documents, where it may not search; a question that occurs twice is asked once.
    compute: each rank asks its share, and all know the answers."""
    asked = list(dict.fromkeys(query["query"] for query in queries))
    rank, ranks = (compute.rank, compute.world_size) if compute else (0, 1)
    own = asked[rank::ranks]
    talks = [{"messages": [{"role": "user", "content": text}]} for text in own]
    found = engine.generate_from_conversations(
        talks, batch_size, searching=Searching(_nothing, max_hops=0), max_tokens=max_tokens
    )
    said = dict(zip(own, (text for text, _ in found), strict=True))
    if ranks > 1:
        parts: list[dict[str, str]] = [{} for _ in range(ranks)]
        dist.all_gather_object(parts, said)
        said = {question: text for part in parts for question, text in part.items()}
    return [said[query["query"]] for query in queries]


def search_needed(queries: Sequence[dict[str, Any]], said: Sequence[str]) -> list[bool]:
    """The oracle: search where the answer without it is wrong. Where there is no answer, abstaining is right."""
    return [
        not (text.strip() and exact_match(stated_answer(text), query["answers"]))
        for query, text in zip(queries, said, strict=True)
    ]


def oracle_decisions(
    queries: Sequence[dict[str, Any]],
    start: dict[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = 32,
    compute: Compute | None = None,
) -> list[bool] | None:
    """The oracle's decisions for the model that training started from: {"source", "model_tag", "step"}, as an agent's
    checkpoints hold it. Where that is gone, those of the questions themselves ("search": true or false), or None."""
    root = checkpoint_root(start["source"], start["model_tag"]) if start else None
    if root is not None and start["step"] in list_steps(root):
        model, tokenizer, _, _ = load_checkpoint(root, start["step"], device, with_optimizer=False)
        with torch.inference_mode(), autocast(device, dtype):
            said = closed_book(Engine(model, tokenizer), queries, max_tokens, compute=compute)
        return search_needed(queries, said)
    needed = [query.get("search") for query in queries]
    return needed if all(isinstance(need, bool) for need in needed) else None


class AgentTask:
    """Conversations of the oracle's decisions: a direct answer, or as make_searching has it a search with what the
    retriever finds, then the cited answer."""

    def __init__(
        self,
        queries: Sequence[dict[str, Any]],
        search: Sequence[bool],
        make_searching: Callable[[list[dict[str, Any]]], MultiHopRAGTask],
    ):
        pairs = list(zip(queries, search, strict=True))
        self.direct = [query for query, needed in pairs if not needed]
        to_search = [query for query, needed in pairs if needed]
        usable = [query for query in to_search if bool(query["answers"]) == bool(query["doc_ids"])]
        if len(usable) < len(to_search):
            print0(f"{len(to_search) - len(usable):,} questions to search for name no gold document: left out")
        self.searching = make_searching(usable) if usable else None

    def __len__(self) -> int:
        return len(self.direct) + len(self.searching or ())

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def conversation(self, index: int, epoch: int = 0) -> Conversation:
        """The direct ones first; another epoch shuffles the others' documents anew."""
        if index >= len(self.direct):
            return self.searching.conversation(index - len(self.direct), epoch)
        query = self.direct[index]
        answer = query["answers"][0] if query["answers"] else ABSTENTION
        messages = [{"role": "user", "content": query["query"]}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "metadata": {"query": query["id"]}}


def policy_figures(answers: Sequence[tuple[str, Generation]], needed: Sequence[bool] | None) -> dict[str, float]:
    """search_rate: the share of questions that were searched for at all; and how good those decisions are, where the
    oracle's are known (nanochat.metrics.search_decisions)."""
    searched = [bool(info.hops) for _, info in answers]
    figures = {"search_rate": sum(searched) / len(searched)}
    return figures | (search_decisions(searched, needed) if needed is not None else {})
