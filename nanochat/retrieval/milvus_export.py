"""A knowledge base into Milvus (nanochat.retrieval.milvus), in batches that an interrupted export goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.collection import Collection
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.milvus import MilvusRetriever
from nanochat.retrieval.milvus_store import State, Store, told


def export_knowledge_base(
    knowledge_base: KnowledgeBase,
    uri: str | Path,
    collection: str = "documents",
    search: str | None = None,
    replace: bool = False,
    after: Callable[[int], None] | None = None,
    **settings: Any,
) -> MilvusRetriever:
    """Its documents, with the embeddings they have, into a collection of Milvus. One that was interrupted goes on where
    it was; replace: throw away what else the collection has. after: told how many are there, after each batch."""
    search = search or ("bm25" if knowledge_base.retriever_type == "simple" else knowledge_base.retriever_type)
    if search not in ("bm25", "dense", "hybrid"):
        raise UserError(f"milvus does not search by {search!r}; give --type bm25, dense or hybrid")
    places = {name: settings.pop(name) for name in ("token", "dense_index") if name in settings}
    settings = {**settings, **knowledge_base.retriever(search, **settings).settings()}  # it has what is needed
    if replace:
        store = Store(str(uri), collection, places.get("token", ""))
        with told(uri, store):
            store.drop()
    retriever = MilvusRetriever(uri, collection, search, **places, **settings)
    source = [str(knowledge_base.path.resolve()), knowledge_base.version, knowledge_base.manifest["created"]]
    with retriever.told():
        state, there = retriever.store.state(), retriever.store.count()
    if there and state.export.get("source") != source:
        raise UserError(
            f"{retriever} has documents of something else; give another --collection, or --replace true to throw them "
            "away"
        )
    done = state.export.get("done", 0)

    def note(state: State, count: int) -> None:
        nonlocal done
        done += count
        state.export = {"source": source, "done": done}
        if after is not None:
            after(done)

    retriever.push(islice(_with_embeddings(knowledge_base.documents, search), done, None), note)
    with retriever.told():
        there = retriever.store.count()
    if not there == len(retriever) == len(knowledge_base):
        raise UserError(
            f"{retriever} has {there:,} documents and counts {len(retriever):,}, {knowledge_base.path} has "
            f"{len(knowledge_base):,}; export again with --replace true"
        )
    return retriever


def _with_embeddings(documents: Collection, search: str) -> Iterator[tuple[Document, np.ndarray | None]]:
    for segment in documents.segments:
        for row in segment.live_rows().tolist():
            yield segment.documents[row], None if search == "bm25" else segment.embeddings[row]
