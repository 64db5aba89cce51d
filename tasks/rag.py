"""RAG conversations: retrieved documents, a question, its answer.

From a queries file, a context holds the question's gold documents and the best retrieved others as distractors, in
random order (RAFT: Zhang et al. 2024, arXiv 2403.10131). Where none of them has the answer, because the knowledge base
does not hold it or because its document was left out, the answer is that the documents do not say: taught the answer
itself, a model would learn to say what it cannot read. From a base task (any conversations), the retrieved documents go
before the last question. Retrieval runs once for the whole set, in batches, and is kept by content, so that training
never waits for it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from nanochat.common import UserError, atomic_write_text, get_base_dir
from nanochat.metrics import ABSTENTION, normalize_answer
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.chunking import sentences
from nanochat.retrieval.document import Document
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


NEARLY = 0.5  # of the absent questions, where a question without an answer comes near the documents shown


class RAGTask:
    """Conversations from questions with gold documents.

    queries: by the Query contract. Those without an answer are answered with metrics.ABSTENTION; those with an answer
    and no gold document are left out. top_k: documents in a context.
    questions_per_document: every document shown, distractors too, is asked this many of the questions that it answers,
    as turns of one talk in random order, which gives more learned tokens for each token read. With more than a few,
    later questions can be answered from the earlier ones instead of from the documents. 0: the one question only.
    absent: share of all these questions whose documents are not shown, nor any document that has the answer, and which
    are answered with the abstention too. They are about documents that were found and left out, or, where there are
    such, they are questions without an answer for which a document shown was found: both name in part what it is about.
    cite: an answer begins with the numbers of the documents it comes from, "[2] 1904". The reader can check it, and the
    model has to find the document first. quote: behind the numbers stands the sentence that the answer is in, “...”.
    distractors: retrieved, or random ones; gold_first: the gold documents before the others. Both are for comparison:
    with easy distractors and a known place a model learns to read the first document, or the one that fits at all.
    """

    def __init__(
        self,
        queries: Sequence[dict[str, Any]],
        manager: RetrievalManager,
        top_k: int = 5,
        questions_per_document: int = 1,
        cite: bool = False,
        seed: int = 0,
        absent: float = 0.0,
        quote: bool = False,
        distractors: Literal["retrieved", "random"] = "retrieved",
        gold_first: bool = False,
    ):
        self.queries = [q for q in queries if bool(q["answers"]) == bool(q["doc_ids"])]
        if not any(q["answers"] for q in self.queries):
            raise UserError("none of the queries has both an answer and a gold document: nothing to train on")
        self.manager, self.top_k, self.seed = manager, top_k, seed
        self.questions_per_document, self.cite, self.quote = questions_per_document, cite, quote
        self.absent, self.distractors, self.gold_first = absent, distractors, gold_first
        require_documents(manager, (i for q in self.queries for i in q["doc_ids"]))
        self.found = retrieve_all(manager, [q["query"] for q in self.queries], (2 if absent else 1) * top_k + 1)
        self.asked_of: dict[str, list[int]] = defaultdict(list)  # document -> the questions it alone answers
        for i, query in enumerate(self.queries):
            if len(query["doc_ids"]) == 1:
                self.asked_of[query["doc_ids"][0]].append(i)
        self._asked_about = sorted(self.asked_of)
        # document -> the questions without an answer that it was found for: they name what it is about in part
        self.nearly_of: dict[str, list[int]] = defaultdict(list)
        for i, query in enumerate(self.queries):
            if not query["answers"]:
                for doc in self.found[i][:top_k]:
                    self.nearly_of[doc].append(i)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def context(self, index: int, rng: random.Random, top_k: int) -> tuple[list[str], list[str]]:
        """Ids of the documents shown: the gold ones and the best retrieved others up to top_k, shuffled; and of those
        that are left out to be asked about."""
        gold = list(dict.fromkeys(self.queries[index]["doc_ids"]))
        spare = 0
        if self.absent and self.questions_per_document:
            wanted = top_k * self.absent / (1 - self.absent)
            spare = int(wanted) + (rng.random() < wanted % 1)
        hidden = bool(gold and self.absent) and rng.random() < self.absent
        others = self._others(index, rng, max(0, top_k - (0 if hidden else len(gold))) + spare)
        away = self._leave_out(others, rng, spare)
        ids = [i for i in others if i not in away]
        if hidden:
            ids = self._without_answer(self.queries[index], ids)
        if not hidden or not ids:
            ids = gold + ids
        if hidden or not self.gold_first:
            rng.shuffle(ids)
        return ids, away

    def _others(self, index: int, rng: random.Random, count: int) -> list[str]:
        gold = self.queries[index]["doc_ids"]
        if self.distractors == "random":
            drawn = rng.sample(self._asked_about, min(count + len(gold), len(self._asked_about)))
            return [i for i in drawn if i not in gold][:count]
        return [i for i in self.found[index] if i not in gold][:count]

    def _leave_out(self, ids: Sequence[str], rng: random.Random, count: int) -> list[str]:
        some = [i for i in ids if i in self.asked_of]
        return rng.sample(some, min(count, len(some)))

    def _nearly(self, ids: Sequence[str], rng: random.Random, asked: Sequence[int]) -> int | None:
        """At times, a question without an answer that one of the documents was found for."""
        near = [i for doc in ids for i in self.nearly_of.get(doc, ()) if i not in asked]
        return rng.choice(near) if near and rng.random() < NEARLY else None

    def _without_answer(self, query: dict[str, Any], ids: Sequence[str]) -> list[str]:
        """Those of the documents that the answer is not in."""
        answers = [normalize_answer(answer) for answer in query["answers"]]
        left = []
        for document in self.manager.documents(ids):
            text = f" {normalize_answer(f'{document.title} {document.content}')} "
            if not any(f" {answer} " in text for answer in answers):
                left.append(document.id)
        return left

    def conversation(self, index: int, epoch: int = 0, top_k: int | None = None) -> Conversation:
        """The index-th example; another epoch shuffles documents and further questions anew."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        ids, away = self.context(index, rng, top_k or self.top_k)
        asked = [index]
        for doc in [*ids, *away]:
            others = [i for i in self.asked_of.get(doc, ()) if i != index]
            wanted = self.questions_per_document - (doc in self.queries[index]["doc_ids"])
            drawn = rng.sample(others, max(0, min(len(others), wanted)))
            for i in drawn:
                if doc not in away:
                    asked.append(i)
                elif (near := self._nearly(ids, rng, asked)) is not None:
                    asked.append(near)
                elif len(self._without_answer(self.queries[i], ids)) == len(ids):
                    asked.append(i)  # where a document shown has the answer, nothing would be missing
        rng.shuffle(asked)
        documents = self.manager.documents(ids)
        shown = [document.to_dict(with_score=False) for document in documents]
        messages: list[dict[str, Any]] = [{"role": "retrieval", "documents": shown}]
        for i in asked:
            messages.append({"role": "user", "content": self.queries[i]["query"]})
            messages.append({"role": "assistant", "content": self._answer(self.queries[i], documents)})
        return {"messages": messages, "metadata": {"query": self.queries[index]["id"]}}

    def _answer(self, query: dict[str, Any], documents: Sequence[Document]) -> str:
        gold = [n for n, document in enumerate(documents, 1) if document.id in query["doc_ids"]]
        if len(gold) < len(set(query["doc_ids"])) or not gold:
            return ABSTENTION
        answer = query["answers"][0]
        parts = [f"[{n}]" for n in gold] if self.cite else []
        if self.quote and (sentence := find_quote(answer, [documents[n - 1].content for n in gold])):
            parts.append(f"“{sentence}”")
        return " ".join([*parts, answer])


MAX_QUOTE_WORDS = 30


def find_quote(answer: str, texts: Sequence[str]) -> str:
    """The first sentence that has the answer, of a long one the words around it; "" if there is none."""
    for text in texts:
        for start, end in sentences(text):
            sentence = " ".join(text[start:end].split()).replace("“", '"').replace("”", '"')
            at = sentence.find(answer)
            if at < 0:
                continue
            words = sentence.split(" ")
            if len(words) > MAX_QUOTE_WORDS:
                first = sentence[:at].count(" ")
                begin = max(0, first + len(answer.split()) // 2 - MAX_QUOTE_WORDS // 2)
                words = words[begin : begin + MAX_QUOTE_WORDS]
            return " ".join(words)
    return ""


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


class PlainTask:
    """Conversations as they are, without documents, `count` in an epoch: another part of them each epoch."""

    def __init__(self, base: Sequence[Conversation], count: int):
        self.base, self.count = base, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(index)

    def conversation(self, index: int, epoch: int = 0, top_k: int | None = None) -> Conversation:
        return self.base[(epoch * self.count + index) % len(self.base)]
