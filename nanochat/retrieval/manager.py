"""RetrievalManager: the way into retrieval for everything that is not retrieval.

manager = RetrievalManager(retriever_type="bm25", knowledge_base_path="data/my_kb")
for document in manager.retrieve("return policy", top_k=3):
    print(f"{document.score:.3f} {document.title}")
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.create import ELSEWHERE, create_retriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase, live_version, newest
from nanochat.retrieval.retriever import Retriever

CACHED_QUERIES = 4096


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
        Elsewhere: knowledge_base_path="http://HOST:8090", a base on another machine (nanochat.retrieval.serve), or
        "milvus:http://HOST:19530#COLLECTION", "milvus:data/big.db#COLLECTION" (nanochat.retrieval.milvus); the same are
        retriever_type="client", url=... and retriever_type="milvus", uri=..., collection=...
        """
        self.settings = settings
        self._asked_type = retriever_type
        self._cache: OrderedDict[Any, list[Document]] = OrderedDict()
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        path = knowledge_base_path if knowledge_base_path is not None else knowledge_base
        self.knowledge_base = None
        if path is not None and (place := elsewhere(str(path))):
            if retriever_type in (None, place[0]):
                retriever_type, path, settings = place[0], None, {**place[1], **settings}
            else:
                raise UserError(f"{path} decides itself how it searches; leave {retriever_type!r} out")
        if retriever_type in ELSEWHERE:
            self.retriever = create_retriever(retriever_type, **settings)
            return
        if (path is None) == (documents is None):
            raise UserError(
                "RetrievalManager needs a knowledge base (knowledge_base_path=...) or documents=[...]: one of them"
            )
        if path is not None:
            made = newest(path, lambda found: (found, found.retriever(retriever_type, **settings)))
            self.knowledge_base, self.retriever = made
        else:
            self.retriever = create_retriever(retriever_type or "bm25", **settings)
            self.retriever.add(d if isinstance(d, Document) else Document.from_dict(d) for d in documents or ())

    @property
    def retriever_type(self) -> str:
        return self.retriever.type

    @property
    def place(self) -> str:
        """Where the documents are, for people."""
        return str(self.knowledge_base.path if self.knowledge_base else getattr(self.retriever, "url", self.retriever))

    def __len__(self) -> int:
        return len(self.retriever)

    def retrieve(self, query: str, top_k: int = 5, where: dict[str, Any] | None = None) -> list[Document]:
        """The best documents for one query, best first; where: only those with such metadata
        (nanochat.retrieval.filters)."""
        return self.search([query], top_k, where)[0]

    def search(self, queries: list[str], top_k: int = 5, where: dict[str, Any] | None = None) -> list[list[Document]]:
        """The same for many queries at once, which is faster than one by one."""
        return self.search_with_version(queries, top_k, where)[1]

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """The documents of these ids."""
        found = self.retriever.get(ids)
        for id, document in zip(ids, found, strict=True):
            if document is None:
                raise UserError(f"there is no document {id!r} in the knowledge base")
        return found

    def unknown(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that no document has."""
        ids = list(dict.fromkeys(ids))
        return [id for id, document in zip(ids, self.retriever.get(ids), strict=True) if document is None]

    def identity(self) -> Any:
        """What changes whenever a search might find something else; JSON values. None if there is no telling."""
        if self.knowledge_base is not None:
            return [self.knowledge_base.manifest, self.retriever.type, self.retriever.settings()]
        return [self.retriever.stats(), self.retriever.settings()] if self.retriever.type in ELSEWHERE else None

    def search_with_version(
        self, queries: list[str], top_k: int = 5, where: dict[str, Any] | None = None, explain: bool = False
    ) -> tuple[str | None, list[list[Document]]]:
        """And the version of the knowledge base that answered. What was asked before of this version is remembered."""
        self.refresh()
        with self._lock:
            version, retriever = self.version, self.retriever
        if version is None or len(queries) > CACHED_QUERIES:  # a training set goes by once, and has a cache of its own
            return version, retriever.search(queries, top_k, where, explain)
        asked_for = (version, top_k, repr(where), explain)
        keys = [(*asked_for, query) for query in queries]
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
        asked = list(dict.fromkeys(query for query, key in zip(queries, keys, strict=True) if key not in known))
        for query, found in zip(asked, retriever.search(asked, top_k, where, explain), strict=True):
            known[(*asked_for, query)] = found
        with self._lock:
            for key in keys:
                self._cache[key] = known[key]
                self._cache.move_to_end(key)
            while len(self._cache) > CACHED_QUERIES:
                self._cache.popitem(last=False)
        return version, [[replace(d, metadata=dict(d.metadata)) for d in known[key]] for key in keys]

    @property
    def version(self) -> str | None:
        return self.knowledge_base.version if self.knowledge_base is not None else None

    def refresh(self, now: bool = False) -> bool:
        """Open the base anew if there is a newer version; looked for once a second, or now. Searches under way go on
        with the old one."""
        if self.knowledge_base is None:
            return False
        with self._lock:
            if not now and time.monotonic() - self._looked < 1:
                return False
            self._looked = time.monotonic()
        if live_version(self.knowledge_base.path) in (None, self.version):
            return False
        made = newest(self.knowledge_base.path, lambda found: (found, self._retriever_of(found)))
        with self._lock:
            self.knowledge_base, self.retriever = made
        return True

    def _retriever_of(self, knowledge_base: KnowledgeBase) -> Retriever:
        old = self.knowledge_base.manifest
        if any(old[name] != knowledge_base.manifest[name] for name in ("retriever", "settings", "embedding")):
            return knowledge_base.retriever(self._asked_type, **self.settings)
        retriever = self.retriever.over(knowledge_base.documents)  # its embedding model need not be loaded again
        with knowledge_base.reading():
            retriever.load_beside(knowledge_base.directory)
        return retriever

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


def elsewhere(path: str) -> tuple[str, dict[str, Any]] | None:
    """(retriever type, settings) if a knowledge base's path is an address: http://HOST:PORT (a Path has one slash
    there), or milvus:URI#COLLECTION."""
    if match := re.match(r"(https?):/+(.+)", path):
        return "client", {"url": f"{match[1]}://{match[2]}"}
    if path.startswith("milvus:"):
        uri, _, collection = path.removeprefix("milvus:").partition("#")
        uri = re.sub(r"^(https?|tcp|unix):/+", r"\1://", uri)
        return "milvus", {"uri": uri, **({"collection": collection} if collection else {})}
    return None
