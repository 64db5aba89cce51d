"""Ways to answer a question that scripts.rag_eval compares: from documents that somebody found, by searching while
answering, from the facts of a graph. Each gives one Answered per question, and how long it took.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
from tasks.rag_figures import RANKS, Answered, Figure, bootstrap, searched

More = dict[str, float | Figure]
"""Figures of a system as a whole, some of them with an interval."""
PIECES = 10  # that a set of questions is timed in, for the interval of its speed
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
    refusal_threshold: float | None = None

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
) -> tuple[list[Answered], More]:
    """Each question with its own documents. found: the ids of all that the search ranked."""
    engine = answering.engine
    prompts = [
        render_prompt({"messages": messages(q, s)}, engine.tokenizer, answering.room, answering.max_doc_length)
        for q, s in zip(queries, shown, strict=True)
    ]
    generated: list[list[int]] = []
    pace = Pace()
    with answering.autocast():
        for piece in pieces(len(prompts), answering.batch_size):
            with pace.timed():
                generated += engine.generate_batch(
                    prompts[piece],
                    answering.batch_size,
                    max_tokens=answering.max_tokens,
                    refusal_threshold=answering.refusal_threshold,
                )
            pace.tokens.append(sum(map(len, generated[piece])))
    rows = [
        Answered(query, answer_text(ids, engine.tokenizer), documents, ranked, query["doc_ids"])
        for query, documents, ranked, ids in zip(queries, shown, found or [None] * len(queries), generated, strict=True)
    ]
    return rows, {"prompt_tokens": sum(map(len, prompts)) / len(prompts), **pace.figures(len(queries))}


def pieces(count: int, batch_size: int) -> list[slice]:
    """Of a list: at most PIECES, none of less than a batch but where there is no more."""
    size = max(batch_size, -(-count // PIECES))
    return [slice(start, start + size) for start in range(0, count, size)]


@dataclass
class Pace:
    """Seconds and tokens of each piece."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - began)

    def figures(self, questions: int) -> More:
        both = np.array([self.tokens, self.seconds]).T
        rate = bootstrap(both, lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
        return {"seconds_per_question": sum(self.seconds) / questions, "tokens_per_s": rate}


def first_token(queries: list[dict], shown: list[list[Document]], answering: Answering) -> More:
    """Median milliseconds from a question with its documents to the first token of its answer, one at a time."""
    times = []
    with answering.autocast():
        for query, documents in zip(queries, shown, strict=True):
            _, info = answering.engine.generate_from_conversation(
                {"messages": messages(query, documents)}, answering.room, answering.max_doc_length, max_tokens=1
            )
            times.append(info.first_token_seconds)
    return {"first_token_ms": bootstrap(1000 * np.array(times), np.median)} if times else {}


def by_position(
    queries: list[dict], manager: RetrievalManager, top_k: int, answering: Answering
) -> tuple[More, dict[int, float]]:
    """EM with the gold document in each place among the best others, of the same questions: position_spread, the best
    place's less the worst's, and EM by place."""
    asked = [query for query in queries if len(query["doc_ids"]) == 1 and query["answers"]]
    if not asked or top_k < 2:
        return {}, {}
    gold = manager.documents([query["doc_ids"][0] for query in asked])
    found = manager.search([query["query"] for query in asked], top_k)
    others = [[d for d in ranked if d.id != g.id][: top_k - 1] for ranked, g in zip(found, gold, strict=True)]
    right = np.zeros((len(asked), top_k))
    for place in range(top_k):
        shown = [[*rest[:place], g, *rest[place:]] for rest, g in zip(others, gold, strict=True)]
        rows, _ = from_documents(asked, shown, None, answering)
        right[:, place] = [exact_match(stated_answer(row.text), row.query["answers"]) for row in rows]
    em = {place + 1: float(mean) for place, mean in enumerate(right.mean(0))}
    return {"position_spread": bootstrap(right, lambda rows: np.ptp(rows.mean(0)))}, em


def found_by_index(index: SearchIndex, queries: list[dict], manager: RetrievalManager, top_k: int) -> list[list[str]]:
    """Ids of the base's documents."""
    there = frozenset(index.ids.sequences) - frozenset(manager.unknown(index.ids.sequences))
    found = index.search([query["query"] for query in queries], top_k, there)
    return [[id for id, _ in ranked] for ranked in found]


def by_searching(
    queries: list[dict], manager: RetrievalManager, searching: Searching, answering: Answering, decides: bool = False
) -> tuple[list[Answered], More]:
    """Where the model searches by itself, and how much it did; prompt tokens are all that it read. decides: also how
    good its decisions to search are."""
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    answers: list[tuple[str, Any]] = []
    pace, longest = Pace(), max(128, answering.max_tokens)
    with answering.autocast():
        for piece in pieces(len(asked), answering.batch_size):
            with pace.timed():
                answers += answering.engine.generate_from_conversations(
                    asked[piece],
                    answering.batch_size,
                    searching=searching,
                    max_tokens=longest,
                    refusal_threshold=answering.refusal_threshold,
                )
            pace.tokens.append(sum(sum(info.mask) for _, info in answers[piece]))
    rows = [searched(query, *answer) for query, answer in zip(queries, answers, strict=True)]
    read = sum(info.prompt_tokens + len(info.ids) - sum(info.mask) for _, info in answers)
    scores: More = {"prompt_tokens": read / len(queries), **pace.figures(len(queries))}
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
