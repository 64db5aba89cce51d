"""RetrievalManager: the way into retrieval for everything that is not retrieval.

manager = RetrievalManager(retriever_type="bm25", knowledge_base_path="data/my_kb")
for document in manager.retrieve("return policy", top_k=3):
    print(f"{document.score:.3f} {document.title}")
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.create import create_retriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import open_knowledge_base


class RetrievalManager:
    def __init__(
        self,
        retriever_type: str | None = None,
        knowledge_base_path: str | Path | None = None,
        knowledge_base: str | Path | None = None,
        documents: Iterable[Document | dict[str, Any]] | None = None,
        **settings: Any,
    ):
        """Over a knowledge base, or over documents in memory.

        retriever_type: the one the base was built with if None. knowledge_base: another name for knowledge_base_path.
        settings: those of the retriever (k1, b, alpha, model, ...), in place of the ones the base was built with.
        """
        path = knowledge_base_path if knowledge_base_path is not None else knowledge_base
        if (path is None) == (documents is None):
            raise UserError(
                "RetrievalManager needs a knowledge base (knowledge_base_path=...) or documents=[...]: one of them"
            )
        if path is not None:
            self.knowledge_base = open_knowledge_base(path)
            self.retriever = self.knowledge_base.retriever(retriever_type, **settings)
        else:
            self.knowledge_base = None
            self.retriever = create_retriever(retriever_type or "bm25", **settings)
            self.retriever.add(d if isinstance(d, Document) else Document.from_dict(d) for d in documents or ())

    @property
    def retriever_type(self) -> str:
        return self.retriever.type

    def __len__(self) -> int:
        return len(self.retriever)

    def retrieve(self, query: str, top_k: int = 5) -> list[Document]:
        """The best documents for one query, best first."""
        return self.retriever.search([query], top_k)[0]

    def search(self, queries: list[str], top_k: int = 5) -> list[list[Document]]:
        """The same for many queries at once, which is faster than one by one."""
        return self.retriever.search(queries, top_k)

    def augment_conversation(self, conversation: dict[str, Any], top_k: int = 5) -> dict[str, Any]:
        """A copy with the documents for the last user message put right before it."""
        messages = conversation.get("messages") or []
        last = max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=None)
        if last is None:
            raise UserError("the conversation has no user message, so there is nothing to search for")
        documents = [document.to_dict() for document in self.retrieve(messages[last]["content"], top_k)]
        augmented = copy.deepcopy(conversation)
        augmented["messages"].insert(last, {"role": "retrieval", "documents": documents})
        return augmented
