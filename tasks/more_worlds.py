"""More to learn from than one example world has: training documents and questions of others beside it.

A small model that is trained for long on 8,000 documents comes to know them by heart, and then reads no better
(docs/lab_notes.md). What is added keeps the example world's promise: no name in it is in val or test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tasks.example_world import World, generate_world, person_in

_NAME = re.compile(r"[A-Z]\w+")


def add_training_worlds(world: World, num_documents: int, seeds: Sequence[int]) -> None:
    """Into `world`'s training split, of each world with these seeds: the documents whose title is new and in which no
    word of val or test is, their facts, and the questions that they answer. The n-th world's ids begin with "n_". They
    come from all its splits: names get longer as short ones run out, and those of val and test are made last."""
    train = [document for document in world.documents if document["metadata"]["split"] == "train"]
    # what a held-out document has and no training document: the names; what both have are words like "Its"
    reserved = _words(d for d in world.documents if d["metadata"]["split"] != "train") - _words(train)
    titles = {document["title"] for document in world.documents}
    for number, seed in enumerate(seeds, start=1):
        other = generate_world(num_documents, seed)
        kept = [d for d in other.documents if not (_words([d]) & reserved) and d["title"] not in titles]
        ids = {document["id"]: f"{number}_{document['id']}" for document in kept}
        names = {document["title"] for document in kept}
        titles |= names
        world.documents += [
            {**document, "id": ids[document["id"]], "metadata": {**document["metadata"], "split": "train"}}
            for document in kept
        ]
        world.triples += [triple for triple in other.triples if triple[0] in names]
        for asked, of_other in (
            (world.questions["train"], other.questions),
            (world.multihop["train"], other.multihop),
            (world.unanswerable["train"], other.unanswerable),
        ):
            new = (
                _renamed(question, number, ids)
                for split in of_other.values()
                for question in split
                if set(question["doc_ids"]) <= set(ids)
            )
            asked += [question for question in new if question["answers"] or not _words_of(question) & reserved]
    nobody = [q for q in world.unanswerable["train"] if not person_in(q["query"], titles)]
    world.unanswerable["train"] = nobody


def _renamed(question: dict[str, Any], number: int, ids: dict[str, str]) -> dict[str, Any]:
    new = {**question, "id": f"{number}_{question['id']}", "doc_ids": [ids[i] for i in question["doc_ids"]]}
    if "hops" in question:
        new["hops"] = [{**hop, "doc_ids": [ids[i] for i in hop["doc_ids"]]} for hop in question["hops"]]
    return new


def _words(documents: Iterable[dict[str, Any]]) -> set[str]:
    return {word for d in documents for word in _NAME.findall(f"{d['title']} {d['content']}")}


def _words_of(question: dict[str, Any]) -> set[str]:
    return set(_NAME.findall(question["query"]))
