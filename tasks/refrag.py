"""Multi-hop conversations: the assistant writes a search, reads what it finds, searches again, and answers.

A query with "hops" (each with its search and its gold documents) becomes one conversation; one without is a single hop.
One without answers ends by abstaining. Loss falls on searches and answer alone: documents are given.

Where do the searches come from (`query_source`)?

    gold      the data: written sub-questions (the example world), or bridge titles (HotpotQA: the title that the first
              document leads to)
    expander  a rule, for data without: the question, then the question and the names that the best document adds to it
    model     a model's own searches, where they found the gold documents (`model_hops`), else gold
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from nanochat.common import UserError
from nanochat.engine import Engine, Generation
from nanochat.metrics import ABSTENTION
from nanochat.retrieval import Document, RetrievalManager
from nanochat.searching import Searching
from tasks.common import Conversation
from tasks.rag import require_documents, retrieve_all
from tasks.rag_figures import ABSTENTION_FIGURES, figures, parts, searched

_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_MOST_NAMES = 8


def hops_of(query: dict[str, Any]) -> list[dict[str, Any]]:
    """Searches and gold documents, in order; a query without hops searches for itself."""
    return query.get("hops") or [{"query": query["query"], "doc_ids": query["doc_ids"]}]


class MultiHopRAGTask:
    def __init__(
        self,
        queries: Sequence[dict[str, Any]],
        manager: RetrievalManager,
        top_k_per_hop: int = 3,
        cite: bool = True,
        query_source: str = "gold",
        seed: int = 0,
    ):
        """top_k_per_hop: documents of a hop, the gold ones among them. cite: the answer begins with the number of the
        document it stands in, the last hop's, "[4] 1904"."""
        if query_source not in ("gold", "expander"):
            raise UserError(f"query_source is {query_source!r} here; it must be gold or expander")
        self.queries = [q for q in queries if bool(q["answers"]) == bool(q["doc_ids"])]
        if not any(q["answers"] for q in self.queries):
            raise UserError("none of the queries has both an answer and a gold document: nothing to train on")
        self.manager, self.top_k, self.cite, self.seed = manager, top_k_per_hop, cite, seed
        self.hops = [hops_of(q) for q in self.queries]
        require_documents(manager, (i for hops in self.hops for hop in hops for i in hop["doc_ids"]))
        if query_source == "expander":
            self.hops = expand_all(self.queries, self.hops, manager, top_k_per_hop)
        most = max(map(len, self.hops))
        texts = [hop["query"] for hops in self.hops for hop in hops]
        found = iter(retrieve_all(manager, texts, most * top_k_per_hop + 1))
        self.found = [[next(found) for _ in hops] for hops in self.hops]

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def conversation(self, index: int, epoch: int = 0) -> Conversation:
        """The index-th example; another epoch shuffles documents anew."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        query, parts, shown = self.queries[index], [], []
        for hop, found in zip(self.hops[index], self.found[index], strict=True):
            gold = [i for i in dict.fromkeys(hop["doc_ids"]) if i not in shown]
            others = [i for i in found if i not in shown and i not in hop["doc_ids"]]
            ids = gold + others[: max(0, self.top_k - len(gold))]
            rng.shuffle(ids)
            shown += ids
            documents = [document.to_dict(with_score=False) for document in self.manager.documents(ids)]
            parts += [{"type": "search", "query": hop["query"]}, {"type": "documents", "documents": documents}]
        answer = query["answers"][0] if query["answers"] else ABSTENTION
        if self.cite:
            numbers = sorted(shown.index(i) + 1 for i in dict.fromkeys(self.hops[index][-1]["doc_ids"]))
            answer = " ".join([*(f"[{n}]" for n in numbers), answer])
        parts.append({"type": "text", "text": answer})
        messages = [{"role": "user", "content": query["query"]}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "metadata": {"query": query["id"]}}


class StaticRAGTask:
    """Conversations whose documents were retrieved before (tasks.common.load_conversations reads a file of them)."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = list(conversations)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversations[index]

    def conversation(self, index: int, epoch: int = 0) -> Conversation:
        return self.conversations[index]


# --- where searches come from


def expand(question: str, documents: Sequence[Document]) -> str:
    """The next search by rule: the question, and the names in the best document that it does not have."""
    known = question.casefold()
    words = [word for document in documents[:1] for word in _WORD.findall(f"{document.title}\n{document.content}")]
    names = dict.fromkeys(word for word in words if word[0].isupper() and word.casefold() not in known)
    return " ".join([question, *list(names)[:_MOST_NAMES]])


def expand_all(
    queries: Sequence[dict[str, Any]], hops: Sequence[Sequence[dict[str, Any]]], manager: RetrievalManager, top_k: int
) -> list[list[dict[str, Any]]]:
    """The hops with searches by rule: each sees what the one before has found."""
    made: list[list[dict[str, Any]]] = [[{**of[0], "query": q["query"]}] for q, of in zip(queries, hops, strict=True)]
    for number in range(1, max(map(len, hops))):
        at = [i for i, of in enumerate(hops) if len(of) > number]
        found = retrieve_all(manager, [made[i][-1]["query"] for i in at], top_k)
        for i, ids in zip(at, found, strict=True):
            text = expand(queries[i]["query"], manager.documents(ids[:1]))
            made[i].append({**hops[i][number], "query": text})
    return made


def model_hops(
    engine: Engine, queries: Sequence[dict[str, Any]], searching: Searching, max_tokens: int = 128, batch_size: int = 32
) -> list[dict[str, Any]]:
    """The queries with the model's own searches, where these found the gold documents hop by hop."""
    asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
    made = []
    answers = engine.generate_from_conversations(asked, batch_size, searching=searching, max_tokens=max_tokens)
    for query, (_, info) in zip(queries, answers, strict=True):
        gold = hops_of(query)
        right = len(info.hops) == len(gold) and all(
            set(wanted["doc_ids"]) <= {document.id for document in hop.documents}
            for hop, wanted in zip(info.hops, gold, strict=True)
        )
        hops = [{**wanted, "query": hop.query} for hop, wanted in zip(info.hops, gold, strict=True)] if right else gold
        made.append({**query, "hops": hops})
    return made


# --- how well it goes


def multi_hop_figures(queries: Sequence[dict[str, Any]], answers: Sequence[tuple[str, Generation]]) -> dict[str, float]:
    """Means over the queries: em, f1 (of the answer without citations; abstaining is right where there is no answer),
    searches, documents shown, and answered (ended their message); over those with gold documents evidence, the share of
    these found. With questions that have no answer also those of abstaining (tasks/rag_figures.py)."""
    found = figures([parts(searched(query, *answer)) for query, answer in zip(queries, answers, strict=True)])
    refusing = not all(query["answers"] for query in queries)
    wanted = ("em", "f1", "searches", "documents", "answered", "evidence", *(ABSTENTION_FIGURES if refusing else ()))
    return {name: found[name].value for name in wanted if name in found}
