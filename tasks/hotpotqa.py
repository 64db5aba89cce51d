"""HotpotQA (Yang et al. 2018, arXiv 1809.09600) as documents and queries, from the distractor files, as JSON or JSONL.

    documents, queries, skipped = read_hotpotqa("hotpot_dev_distractor_v1.json")

The paragraphs of all questions are pooled into one set of documents. The gold documents of a question are the
paragraphs that hold its supporting facts; a question whose gold paragraphs are not all in the file is skipped and
counted. The files come from https://hotpotqa.github.io/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from tasks.raw_file import read_json_records
from tasks.squad import document_id

_KEYS = ("question", "answer", "supporting_facts", "context")
_IN_BRACKETS = re.compile(r" \([^()]*\)$")


def read_hotpotqa(path: str | Path) -> tuple[list[Document], list[dict[str, Any]], int]:
    """(documents, queries, number of questions skipped)."""
    documents: dict[str, Document] = {}
    queries: dict[str, dict[str, Any]] = {}
    skipped = 0
    for place, record in read_json_records(path):
        id, own, gold_titles = _check(record, place)
        documents.update((document.id, document) for document in own.values())
        if id in queries:
            raise UserError(f"{place}: _id {id!r} was used before; ids must be unique")
        if not gold_titles or any(title not in own for title in gold_titles):
            skipped += 1
            continue
        gold = [own[title] for title in gold_titles]
        queries[id] = {
            "id": id,
            "query": record["question"].strip(),
            "answers": [record["answer"]],
            "doc_ids": [document.id for document in gold],
        }
        order = _bridge_order(gold, record["answer"]) if record.get("type") != "comparison" else None
        if order:
            first, second = order
            queries[id]["doc_ids"] = [first.id, second.id]
            queries[id]["hops"] = [
                {"query": queries[id]["query"], "doc_ids": [first.id]},
                {"query": second.title, "doc_ids": [second.id]},
            ]
    if not queries:
        raise UserError(f"{path}: no question with all its gold paragraphs; a distractor file of HotpotQA is needed")
    return list(documents.values()), list(queries.values()), skipped


def _bridge_order(gold: list[Document], answer: str) -> tuple[Document, Document] | None:
    """The two gold documents in reading order: the first names the second, which holds the answer.

    None where that is not so, or so both ways; then nothing says what the second search should look for.
    """
    if len(gold) != 2:
        return None
    orders = [
        (first, second)
        for first, second in (gold, gold[::-1])
        if _occurs(_IN_BRACKETS.sub("", second.title), first.content)
        and (_occurs(answer, second.content) or _occurs(answer, second.title))
    ]
    return orders[0] if len(orders) == 1 else None


def _occurs(needle: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(needle.lower())}(?!\w)", text.lower()) is not None


def _check(record: dict[str, Any], place: str) -> tuple[str, dict[str, Document], list[str]]:
    """The record's id, its documents by title, and the titles of its gold documents."""
    id = record.get("_id", record.get("id"))
    if not isinstance(id, str) or not id:
        raise UserError(f'{place}: no "_id"; is this a HotpotQA file?')
    for key in _KEYS:
        if not isinstance(record.get(key), str if key in ("question", "answer") else list) or record[key] == "":
            raise UserError(f'{place}: "{key}" is missing or not usable; is this a HotpotQA file with answers?')
    documents: dict[str, Document] = {}
    try:
        for title, sentences in record["context"]:
            text = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
            if text:
                documents[title] = Document(document_id("hotpotqa", title, text), title, text)
        gold_titles = list(dict.fromkeys(title for title, _sentence in record["supporting_facts"]))
    except (TypeError, ValueError, AttributeError):
        raise UserError(
            f'{place}: "context" must be [[title, [sentence, ...]], ...] and "supporting_facts" [[title, number], ...]'
        ) from None
    return id, documents, gold_titles
