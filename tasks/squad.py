"""SQuAD 1.1 and 2.0 as documents and queries (Rajpurkar et al. 2016, arXiv 1606.05250, and 2018, arXiv 1806.03822).

    for article in read_squad("train-v1.1.json.gz"):
        article.documents, article.queries

A passage is a document, with the article's title; its id comes from title and text, so that the same passage has the
same id in every file. The files come from https://rajpurkar.github.io/SQuAD-explorer/.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from tasks.raw_file import read_json


@dataclass
class Article:
    title: str
    documents: list[Document]
    queries: list[dict[str, Any]]


def read_squad(path: str | Path) -> list[Article]:
    """The articles of a file, each with its passages once and its questions in order.

    A question that SQuAD 2.0 marks as impossible has no answers and no gold documents.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("data"), list):
        raise UserError(f'{path}: not a SQuAD file (no "data" list); get one from rajpurkar.github.io/SQuAD-explorer')
    articles: dict[str, Article] = {}
    document_ids: set[str] = set()
    query_ids: set[str] = set()
    for a, entry in enumerate(data["data"]):
        place = f"{path}: data[{a}]"
        # "Beyonc%C3%A9" and "New_York_City" are written as in a web address
        title = unquote(_field(entry, "title", str, place)).replace("_", " ").strip()
        article = articles.setdefault(title, Article(title, [], []))
        for p, paragraph in enumerate(_field(entry, "paragraphs", list, place)):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            text = _field(paragraph, "context", str, place)
            document = Document(document_id("squad", title, text), title, text, metadata={"article": title})
            if document.id not in document_ids:
                document_ids.add(document.id)
                article.documents.append(document)
            for q, question in enumerate(_field(paragraph, "qas", list, place)):
                query = _query(question, document, f"{place}.qas[{q}]")
                if query["id"] in query_ids:
                    raise UserError(f"{place}.qas[{q}]: id {query['id']!r} was used before; ids must be unique")
                query_ids.add(query["id"])
                article.queries.append(query)
    if not query_ids:
        raise UserError(f"{path}: no questions in it")
    return list(articles.values())


def document_id(prefix: str, title: str, text: str) -> str:
    digest = hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()
    return f"{prefix}_{digest[:16]}"


def _query(question: Any, document: Document, place: str) -> dict[str, Any]:
    query = {
        "id": str(_field(question, "id", (str, int), place)),
        "query": _field(question, "question", str, place).strip(),
    }
    if question.get("is_impossible", False):
        return {**query, "answers": [], "doc_ids": []}
    texts = [_field(answer, "text", str, f"{place}.answers") for answer in _field(question, "answers", list, place)]
    if not texts:
        raise UserError(f"{place}: no answers, and not marked as impossible; a file with answers is needed")
    return {**query, "answers": list(dict.fromkeys(texts)), "doc_ids": [document.id]}


def _field(record: Any, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        raise UserError(f'{place}: "{name}" is missing or not usable; is this a SQuAD file?')
    return value
