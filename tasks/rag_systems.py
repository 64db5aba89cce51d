"""Ways to answer a question that scripts.rag_eval compares: from documents that somebody found, by searching while
answering, from the facts of a graph. Each gives one Answered per question, and how long it took.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag
from nanochat.conversation import answer_text, render_prompt
from nanochat.dsi.index import SearchIndex
from nanochat.engine import Engine
from nanochat.kg.drag import load_drag
from nanochat.kg.drag_data import answer_all, ask, score_answers
from nanochat.kg.graph import Graph
from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question
from nanochat.metrics import exact_match, stated_answer
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import Document
from nanochat.searching import Searching
from nanochat.training import autocast, resolve_dtype
from tasks.agent import oracle_decisions, policy_figures
from tasks.rag_figures import RANKS, Answered

FIND = max(RANKS)  # documents that a search ranks, whatever is shown of them


@dataclass
class Answering:
    """How answers are made."""

    engine: Engine
    meta: dict[str, Any]
    max_tokens: int
    max_doc_length: int
    batch_size: int
    dtype: str

    @property
    def room(self) -> int:
        return self.meta["training_config"]["max_seq_len"] - self.max_tokens

    def autocast(self) -> Any:
        device = self.engine.model.device
        return autocast(device, resolve_dtype(self.dtype, device))


def messages(query: dict[str, Any], shown: Sequence[Document]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = [{"role": "user", "content": query["query"]}]
    documents = {"role": "retrieval", "documents": [document.to_dict() for document in shown]}
    return [documents, *asked] if shown else asked


def from_documents(
    queries: list[dict], shown: list[list[Document]], found: list[list[str]] | None, answering: Answering
) -> tuple[list[Answered], dict[str, float]]:
    """Each question with its own documents. found: the ids of all that the search ranked."""
    engine = answering.engine
    prompts = [
        render_prompt({"messages": messages(q, s)}, engine.tokenizer, answering.room, answering.max_doc_length)
        for q, s in zip(queries, shown, strict=True)
    ]
    began = time.perf_counter()
    with answering.autocast():
        generated = engine.generate_batch(prompts, answering.batch_size, max_tokens=answering.max_tokens)
    seconds = time.perf_counter() - began
    rows = [
        Answered(query, answer_text(ids, engine.tokenizer), documents, ranked, query["doc_ids"])
        for query, documents, ranked, ids in zip(queries, shown, found or [None] * len(queries), generated, strict=True)
    ]
    return rows, {
        "seconds_per_question": seconds / len(queries),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "tokens_per_s": sum(map(len, generated)) / seconds,
    }


def first_token(queries: list[dict], shown: list[list[Document]], answering: Answering) -> dict[str, float]:
    """Median milliseconds from a question with its documents to the first token of its answer, one at a time."""
    times = []
    with answering.autocast():
        for query, documents in zip(queries, shown, strict=True):
            _, info = answering.engine.generate_from_conversation(
                {"messages": messages(query, documents)}, answering.room, answering.max_doc_length, max_tokens=1
            )
            times.append(info.first_token_seconds)
    return {"first_token_ms": 1000 * sorted(times)[len(times) // 2]} if times else {}


def by_position(
    queries: list[dict], manager: RetrievalManager, top_k: int, answering: Answering
) -> tuple[dict[str, float], dict[int, float]]:
    """EM with the gold document in each place among the best others, of the same questions: position_spread, the best
    place's less the worst's, and EM by place."""
    asked = [query for query in queries if len(query["doc_ids"]) == 1 and query["answers"]]
    if not asked or top_k < 2:
        return {}, {}
    gold = manager.documents([query["doc_ids"][0] for query in asked])
    found = manager.search([query["query"] for query in asked], top_k)
    others = [[d for d in ranked if d.id != g.id][: top_k - 1] for ranked, g in zip(found, gold, strict=True)]
    em: dict[int, float] = {}
    for place in range(top_k):
        shown = [[*rest[:place], g, *rest[place:]] for rest, g in zip(others, gold, strict=True)]
        rows, _ = from_documents(asked, shown, None, answering)
        em[place + 1] = sum(exact_match(stated_answer(r.text), r.query["answers"]) for r in rows) / len(rows)
    return {"position_spread": max(em.values()) - min(em.values())}, em


def found_by_index(index: SearchIndex, queries: list[dict], manager: RetrievalManager, top_k: int) -> list[list[str]]:
    """Ids of the base's documents."""
    there = frozenset(index.ids.sequences) - frozenset(manager.unknown(index.ids.sequences))
    found = index.search([query["query"] for query in queries], top_k, there)
    return [[id for id, _ in ranked] for ranked in found]


def by_searching(
    queries: list[dict], manager: RetrievalManager, searching: Searching, answering: Answering, decides: bool = False
) -> tuple[list[Answered], dict[str, float]]:
    """Where the model searches by itself, and how much it did; prompt tokens are all that it read. decides: also how
    good its decisions to search are."""
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    began = time.perf_counter()
    with answering.autocast():
        answers = answering.engine.generate_from_conversations(
            asked, answering.batch_size, searching=searching, max_tokens=max(128, answering.max_tokens)
        )
    seconds = time.perf_counter() - began
    rows = []
    for query, (text, info) in zip(queries, answers, strict=True):
        shown = [document for hop in info.hops for document in hop.documents]
        more = {
            "searches": float(len(info.hops)),
            "documents": float(len(shown)),
            "answered": float(info.finish_reason == "stop"),
        }
        if gold := set(query["doc_ids"]):
            more["evidence"] = len(gold & {document.id for document in shown}) / len(gold)
        cite = (query.get("hops") or [query])[-1]["doc_ids"]  # the last hop's answer is what is stated
        rows.append(Answered(query, text, shown, None, cite, more))
    read = sum(info.prompt_tokens + len(info.ids) - sum(info.mask) for _, info in answers)
    scores = {"seconds_per_question": seconds / len(queries), "prompt_tokens": read / len(queries)}
    if decides:
        device = answering.engine.model.device
        start = answering.meta.get("start")
        needed = oracle_decisions(queries, start, device, resolve_dtype(answering.dtype, device))
        scores |= policy_figures(answers, needed)
    return rows, scores


def from_graph(
    queries: list[dict], folder: Path, source: str, tag: str, device: torch.device
) -> tuple[list[Answered], dict[str, float], list[str], dict[str, Any]]:
    """From the facts of a graph: the first answer, and what all of them are worth as a set, which is also returned as
    text. Questions that name no entity are answered with nothing."""
    graph = Graph.load(folder)
    drag, meta = load_drag(checkpoint_root(source, find_model_tag(source, tag)), graph, device=device)
    questions = [Question(query["id"], query["query"], query["answers"]) for query in queries]
    began = time.perf_counter()
    asked, _ = ask(graph, Linker(graph), questions, meta["max_hops"], meta["hub_degree"], meta["max_facts"])
    ids = [one.question.id for one in asked.grounded]
    found = dict(zip(ids, answer_all(drag, asked, range(len(asked))), strict=True))
    seconds = time.perf_counter() - began
    answers = [found[query["id"]].answers if query["id"] in found else [] for query in queries]
    rows = []
    for query, names in zip(queries, answers, strict=True):
        worth = score_answers(names, query["answers"])
        more = {f"set_{name}" if name in ("em", "f1") else name: value for name, value in worth.items()}
        rows.append(Answered(query, names[0] if names else "", more=more))
    scores = {
        "facts_kept": sum(len(answer.facts) for answer in found.values()) / len(queries),
        "prompt_tokens": sum(answer.prompt_tokens for answer in found.values()) / len(queries),
        "seconds_per_question": seconds / len(queries),
    }
    return rows, scores, [", ".join(names) for names in answers], meta


def sample(queries: list[dict], count: int, seed: int) -> list[dict]:
    return random.Random(seed).sample(queries, count) if 0 <= count < len(queries) else queries
