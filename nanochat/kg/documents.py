"""Facts as documents, so that whatever works with documents works with a graph: knowledge bases, prompts, sources.

    {"id": "fact:5f1d0c9a7b3e2468", "title": "Titanic", "content": "Titanic directed by James Cameron.",
     "metadata": {"head": "Titanic", "relation": "directed_by", "tail": "James Cameron"}}

The id is made of the fact itself: it is the same in every graph that has the fact, whatever is added and deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator

from nanochat.common import UserError
from nanochat.kg.triples import Facts
from nanochat.retrieval.document import Document

Triple = tuple[str, str, str]  # head, relation, tail
PARTS = ("head", "relation", "tail")


def fact_id(triple: Triple) -> str:
    # as JSON: "a|b", "c" and "a", "b|c" are two facts
    return f"fact:{hashlib.sha256(json.dumps(triple, ensure_ascii=False).encode()).hexdigest()[:16]}"


def fact_text(triple: Triple) -> str:
    """As a sentence; of a relation's path, people.person.born_in, the last part."""
    head, relation, tail = triple
    words = re.split(r"[./]", relation.rstrip("./"))[-1].replace("_", " ")
    return f"{head} {words} {tail}."


def fact_document(triple: Triple) -> Document:
    metadata = dict(zip(PARTS, triple, strict=True))
    return Document(fact_id(triple), triple[0], fact_text(triple), metadata=metadata)


def fact_documents(facts: Facts) -> Iterator[Document]:
    columns = (facts.heads.tolist(), facts.relations.tolist(), facts.tails.tolist())
    for head, relation, tail in zip(*columns, strict=True):
        yield fact_document((facts.entities[head], facts.relation_names[relation], facts.entities[tail]))


def fact_of(document: Document) -> Triple | None:
    """The fact that a document states, in its metadata or as head|relation|tail; None if it states none."""
    parts = [document.metadata.get(name) for name in PARTS]
    if parts == [None, None, None]:
        content = document.content.strip()
        parts = content.split("|") if "\n" not in content else []
    if len(parts) != 3 or not all(isinstance(part, str) and part.strip() for part in parts):
        return None
    return tuple(part.strip() for part in parts)


def as_facts(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, each of which must state a fact; head|relation|tail becomes a sentence."""
    for document in documents:
        triple = fact_of(document)
        if triple is None:
            raise UserError(
                f"document {document.id!r} states no fact: it needs head, relation and tail as strings in its "
                "metadata, or a content of head|relation|tail"
            )
        if "head" not in document.metadata:
            made = fact_document(triple)
            metadata = {**document.metadata, **made.metadata}
            document = dataclasses.replace(
                document, title=document.title or made.title, content=made.content, metadata=metadata
            )
        yield document
