"""Documents and queries, and the one reader of JSONL.

Files come from users, so every line is checked before anything is built from it. An error names the file and the line,
says what is wrong and what to do. Lines end at b"\\n" only: Unicode has other line breaks, and they occur inside
documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write_bytes

MAX_LINE_BYTES = 10_000_000
_PLAIN = {"id", "title", "content"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Document:
    id: str
    title: str
    content: str
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    score: float = 0.0  # how well it matched; set on retrieved documents only
    explanation: dict[str, Any] = field(
        default_factory=dict
    )  # rank and score by each part of a retriever, if asked for

    def to_line(self) -> bytes:
        """As JSON with a line break, without the score."""
        if self.source or self.metadata:
            return _line(self.to_dict(with_score=False))
        # the same, five times as fast
        texts = map(encode_basestring, (self.id, self.title, self.content))
        return '{{"id": {}, "title": {}, "content": {}}}\n'.format(*texts).encode()

    def to_dict(self, with_score: bool = True) -> dict[str, Any]:
        """The document as it stands in files and in retrieval messages: empty optional fields are left out."""
        record: dict[str, Any] = {"id": self.id, "title": self.title, "content": self.content}
        if self.source:
            record["source"] = self.source
        if self.metadata:
            record["metadata"] = self.metadata
        if with_score:
            record["score"] = self.score
            if self.explanation:
                record["explanation"] = self.explanation
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Document:
        """Checks types, so that a bad field is met here and not in mid-build. Unknown fields go to metadata."""
        if record.keys() == _PLAIN:  # most are so, and there is nothing to say of them
            id, title, content = record["id"], record["title"], record["content"]
            if type(id) is type(title) is type(content) is str and id.strip() and content and not content.isspace():
                return cls(id, title, content)
        if not isinstance(record.get("id"), str) or not record["id"].strip():
            found = f"id is {_show(record['id'])}" if "id" in record else "there is no id"
            raise UserError(f'{found}; give each document a unique "id" that is a non-empty string')
        for name in ("title", "source"):
            if not isinstance(record.get(name, ""), str):
                raise UserError(f"{name} is {_show(record[name])}; it must be a string")
        content = record.get("content", "")
        if not isinstance(content, str):
            raise UserError(f"content is {_show(content)}; it must be a string")
        if not content.strip():
            found = "content is empty" if "content" in record else "there is no content"
            raise UserError(f'{found}; give the document\'s text in "content", or remove the line')
        metadata = record.get("metadata", {})
        if not isinstance(metadata, dict):
            raise UserError(f"metadata is {_show(metadata)}; it must be an object")
        score = record.get("score", 0.0)
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise UserError(f"score is {_show(score)}; it must be a number")
        known = {"id", "title", "content", "source", "metadata", "score", "explanation"}
        extra = {name: value for name, value in record.items() if name not in known}
        return cls(
            record["id"], record.get("title", ""), content, record.get("source", ""), {**extra, **metadata}, score
        )


def iter_jsonl(path: str | Path, read: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line that is not blank. read: told the size of each line."""
    path = Path(path)
    number = 0
    try:
        with open(path, "rb") as file:
            # the limit: a file that is one endless line is not read to its end
            while line := file.readline(MAX_LINE_BYTES + 2):
                number += 1
                if read is not None:
                    read(len(line))
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if len(line) > MAX_LINE_BYTES:
                    limit = MAX_LINE_BYTES // 1_000_000
                    raise UserError(
                        f"{path}:{number}: the line is over {limit} MB; split this document into smaller ones"
                    )
                if line.strip():
                    yield number, _parse(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if b"\0" in line:
        raise UserError(f"{where}: the line has a NUL byte; is this a text file? Write it again as UTF-8 JSONL")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise UserError(f"{where}: not UTF-8 ({bad}); convert the file: iconv -f latin1 -t utf-8 OLD > NEW") from None
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            raise UserError(
                f"{where}: the JSON is cut off at column {error.pos + 1} ({error.msg}); "
                "write the file again or remove this line"
            ) from None
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.pos + 1}); each line must be one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: the line is {_show(record)}; each line must be one JSON object {{...}}")
    if "\\u" in text:
        # escapes can spell what the bytes may not hold: NUL, and half a surrogate pair (not writable as UTF-8)
        for string in _strings(record):
            if "\0" in string:
                raise UserError(f"{where}: the text has a NUL character (\\u0000); remove it")
            if any("\ud800" <= character <= "\udfff" for character in string):
                raise UserError(f"{where}: half a surrogate pair (\\ud800 to \\udfff) in the text; remove it")
    return record


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _show(value: Any) -> str:
    """A value's JSON type and its beginning, for messages."""
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    return f"the {names.get(type(value), 'value')} {text if len(text) <= 40 else text[:37] + '...'}"


def iter_documents(path: str | Path, read: Callable[[int], None] | None = None) -> Iterator[Document]:
    """The documents of a JSONL file, checked one by one; a second use of an id is an error, as are none at all."""
    first_line: dict[str, int] = {}
    for number, record in iter_jsonl(path, read):
        try:
            document = Document.from_dict(record)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        _check_unique(document.id, number, first_line, path)
        document.score = 0.0
        yield document
    if not first_line:
        raise UserError(
            f'{path}: no documents in it; it needs lines such as {{"id": "1", "title": "", "content": "..."}}'
        )


def read_documents(path: str | Path) -> list[Document]:
    return list(iter_documents(path))


def read_queries(path: str | Path) -> list[dict[str, Any]]:
    """Queries with their answers and gold documents: {"id", "query", "answers", "doc_ids", "hops"?}."""
    queries: list[dict[str, Any]] = []
    first_line: dict[str, int] = {}
    for number, record in iter_jsonl(path):
        problem = _query_problem(record)
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        _check_unique(record["id"], number, first_line, path)
        queries.append(record)
    if not queries:
        raise UserError(
            f"{path}: no queries in it; it needs lines such as "
            '{"id": "1", "query": "...", "answers": ["..."], "doc_ids": ["..."]}'
        )
    return queries


def _query_problem(record: dict[str, Any]) -> str | None:
    for name in ("id", "query"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            found = f"is {_show(record[name])}" if name in record else "is missing"
            return f'"{name}" {found}; it must be a non-empty string'
    for name in ("answers", "doc_ids"):
        if not _is_string_list(record.get(name)):
            found = f"is {_show(record[name])}" if name in record else "is missing"
            return f'"{name}" {found}; it must be a list of strings (empty where nothing answers the query)'
    hops = record.get("hops", [])
    if not isinstance(hops, list):
        return f'"hops" is {_show(hops)}; it must be a list of {{"query", "doc_ids"}}'
    for index, hop in enumerate(hops, 1):
        if (
            not isinstance(hop, dict)
            or not isinstance(hop.get("query"), str)
            or not _is_string_list(hop.get("doc_ids"))
        ):
            return f'hop {index} is {_show(hop)}; it must be {{"query": string, "doc_ids": list of strings}}'
    return None


def _is_string_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_unique(id: str, number: int, first_line: dict[str, int], path: str | Path) -> None:
    if id in first_line:
        raise UserError(f"{path}:{number}: id {id!r} was used in line {first_line[id]} already; make ids unique")
    first_line[id] = number


def write_jsonl(path: str | Path, records: Iterable[Document | dict[str, Any]]) -> int:
    """One object a line; the file appears whole or not at all. Returns the number of lines."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in records:
            count += 1
            yield record.to_line() if isinstance(record, Document) else _line(record)

    try:
        atomic_write_bytes(path, lines())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); make room there, or give another place") from error
    return count


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
