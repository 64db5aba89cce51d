"""RAG conversations: retrieved documents, a question, its answer.

From a queries file, a context holds the question's gold documents and the best retrieved others as distractors, in
random order. From a base task (any conversations), the retrieved documents go before the last question. Retrieval runs
once for the whole set, in batches, and is kept by content, so that training never waits for it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.common import UserError, atomic_write_text, get_base_dir
from nanochat.retrieval import RetrievalManager
from tasks.common import Conversation


def retrieve_all(manager: RetrievalManager, queries: Sequence[str], top_k: int) -> list[list[str]]:
    """Ids of the best documents for each query, from $NANOCHAT_BASE_DIR/retrieved if this was asked before."""
    base = manager.identity()
    key = hashlib.sha256(json.dumps([base, top_k, *queries], sort_keys=True, default=str).encode()).hexdigest()[:24]
    file = get_base_dir() / "retrieved" / f"{key}.json"
    if base is not None and file.exists():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            pass  # damaged: search again
    found: list[list[str]] = []
    for start in range(0, len(queries), 1024):
        found += [[d.id for d in docs] for docs in manager.search(list(queries[start : start + 1024]), top_k)]
    if base is not None:
        atomic_write_text(file, json.dumps(found))
    return found


def require_documents(manager: RetrievalManager, ids: Iterable[str]) -> None:
    """UserError if the knowledge base lacks one of these."""
    if unknown := manager.unknown(ids):
        raise UserError(
            f"the knowledge base does not hold the document {unknown[0]!r} that a query names: build the base from the "
            "same documents as the queries"
        )


class RAGTask:
    """Conversations from questions with gold documents.

    queries: by the Query contract; those without an answer or a gold document are left out. top_k: documents in a
    context. questions_per_document: every document shown, distractors too, is asked this many of the questions that it
    answers, as turns of one talk in random order, which gives more learned tokens for each token read. With more than a
    few, later questions can be answered from the earlier ones instead of from the documents. 0: the one question only.
    cite: an answer begins with the numbers of the documents it comes from, "[2] 1904". The reader can check it, and the
    model has to find the document first.
    """

    def __init__(
        self,
        queries: Sequence[dict[str, Any]],
        manager: RetrievalManager,
        top_k: int = 5,
        questions_per_document: int = 1,
        cite: bool = False,
        seed: int = 0,
    ):
        self.queries = [q for q in queries if q["answers"] and q["doc_ids"]]
        if not self.queries:
            raise UserError("none of the queries has both an answer and a gold document: nothing to train on")
        self.manager, self.top_k, self.seed = manager, top_k, seed
        self.questions_per_document, self.cite = questions_per_document, cite
        require_documents(manager, (i for q in self.queries for i in q["doc_ids"]))
        self.found = retrieve_all(manager, [q["query"] for q in self.queries], top_k + 1)
        self.asked_of: dict[str, list[int]] = defaultdict(list)  # document -> the questions it alone answers
        for i, query in enumerate(self.queries):
            if len(query["doc_ids"]) == 1:
                self.asked_of[query["doc_ids"][0]].append(i)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def context(self, index: int, rng: random.Random, top_k: int) -> list[str]:
        """Document ids: the gold ones, and the best retrieved others up to top_k, shuffled."""
        gold = list(dict.fromkeys(self.queries[index]["doc_ids"]))
        others = [i for i in self.found[index] if i not in gold]
        ids = gold + others[: max(0, top_k - len(gold))]
        rng.shuffle(ids)
        return ids

    def conversation(self, index: int, epoch: int = 0, top_k: int | None = None) -> Conversation:
        """The index-th example; another epoch shuffles documents and further questions anew."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        ids = self.context(index, rng, top_k or self.top_k)
        asked = [index]
        for doc in ids:
            others = [i for i in self.asked_of[doc] if i != index]
            wanted = self.questions_per_document - (doc in self.queries[index]["doc_ids"])
            asked += rng.sample(others, max(0, min(len(others), wanted)))
        rng.shuffle(asked)
        documents = [document.to_dict(with_score=False) for document in self.manager.documents(ids)]
        messages: list[dict[str, Any]] = [{"role": "retrieval", "documents": documents}]
        for i in asked:
            messages.append({"role": "user", "content": self.queries[i]["query"]})
            answer = self.queries[i]["answers"][0]
            if self.cite:
                numbers = sorted(ids.index(doc) + 1 for doc in self.queries[i]["doc_ids"])
                answer = " ".join([*(f"[{n}]" for n in numbers), answer])
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages, "metadata": {"query": self.queries[index]["id"]}}


class RetrievalTask:
    """A base task's conversations with the documents found for the last question put before it."""

    def __init__(self, base: Sequence[Conversation], manager: RetrievalManager, top_k: int = 5):
        self.base, self.top_k = base, top_k
        self.manager = manager
        self.at = [max((i for i, m in enumerate(c["messages"]) if m["role"] == "user"), default=None) for c in base]
        if any(i is None for i in self.at):
            raise UserError("a conversation of the base tasks has no user message: there is nothing to search for")
        questions = [c["messages"][i]["content"] for c, i in zip(base, self.at, strict=True)]
        self.found = retrieve_all(manager, questions, top_k)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def conversation(self, index: int, epoch: int = 0, top_k: int | None = None) -> Conversation:
        ids = self.found[index][: top_k or self.top_k]
        messages = list(self.base[index]["messages"])
        shown = [document.to_dict(with_score=False) for document in self.manager.documents(ids)]
        messages.insert(self.at[index], {"role": "retrieval", "documents": shown})
        return {"messages": messages}
