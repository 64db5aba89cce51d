"""Reading what users bring: good files in full, bad ones refused with file, line, reason and remedy."""

from __future__ import annotations

import json

import pytest

from nanochat.common import UserError
from nanochat.retrieval import Document
from nanochat.retrieval.document import MAX_LINE_BYTES, iter_jsonl, read_documents, read_queries, write_jsonl

GOOD = b'{"id": "a", "title": "A", "content": "some text"}\n'


def line(**fields) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_written_documents_read_back_equal(tmp_path):
    documents = [
        Document(
            "a", "Title", "line one\nline two\u2028three \u0085 four\r\n\tfive", "web", {"year": 2024, "tags": ["x"]}
        ),
        Document("ü", "", "日本語 and \U0001f600 and <|bos|>", ""),
    ]
    assert write_jsonl(tmp_path / "new" / "d.jsonl", documents) == 2
    assert read_documents(tmp_path / "new" / "d.jsonl") == documents


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n  \n" + line(id="b", content="more"))
    assert [document.id for document in read_documents(path)] == ["a", "b"]
    assert [number for number, _ in iter_jsonl(path)] == [1, 4]


def test_unicode_line_breaks_inside_a_line_do_not_split_it(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "content": "one\u2028two\u0085three\u2029"}\n', encoding="utf-8")
    assert read_documents(path)[0].content == "one\u2028two\u0085three\u2029"


def test_unknown_fields_are_kept_as_metadata():
    document = Document.from_dict({"id": "a", "content": "x", "url": "http://x", "metadata": {"year": 1}})
    assert document.metadata == {"url": "http://x", "year": 1}
    assert Document.from_dict(document.to_dict()) == document


def test_to_dict_leaves_out_what_is_empty():
    assert Document("a", "A", "x").to_dict(with_score=False) == {"id": "a", "title": "A", "content": "x"}
    assert Document("a", "A", "x", score=2.5).to_dict() == {"id": "a", "title": "A", "content": "x", "score": 2.5}


BAD = {
    "truncated": (b'{"id": "b", "content": "cut of', "cut off"),
    "truncated between fields": (b'{"id": "b", "content": "cut"', "cut off"),
    "not JSON": (b"id,content\n", "not JSON"),
    "two objects": (GOOD.strip() + GOOD, "not JSON"),
    "not UTF-8": (b'{"id": "b", "content": "caf\xe9"}\n', "not UTF-8"),
    "UTF-16": ('{"id": "b"}'.encode("utf-16"), "NUL"),
    "NUL byte": (b'{"id": "b", "content": "x\0y"}\n', "NUL"),
    "escaped NUL": (b'{"id": "b", "content": "x\\u0000y"}\n', "NUL"),
    "half a surrogate pair": (b'{"id": "b", "content": "x\\ud800y"}\n', "surrogate"),
    "half a surrogate pair in metadata": (
        b'{"id": "b", "content": "x", "metadata": {"k": ["\\udc00"]}}\n',
        "surrogate",
    ),
    "duplicate id": (GOOD, "line 1"),
    "missing id": (line(content="x"), "no id"),
    "empty id": (line(id=" ", content="x"), "id is"),
    "number as id": (line(id=5, content="x"), "the number 5"),
    "empty content": (line(id="b", content=" \n"), "content is empty"),
    "missing content": (line(id="b", title="t"), "no content"),
    "content of a wrong type": (line(id="b", content=["x"]), "content is the array"),
    "title of a wrong type": (line(id="b", title=3, content="x"), "title is the number 3"),
    "source of a wrong type": (line(id="b", source=None, content="x"), "source is null"),
    "metadata of a wrong type": (line(id="b", content="x", metadata="m"), "metadata is the string"),
    "an array": (b'["a"]\n', "the array"),
    "a string": (b'"abc"\n', "the string"),
    "null": (b"null\n", "null"),
    "NaN": (b'{"id": "b", "content": "x", "metadata": {"k": NaN}}\n', "NaN"),
    "too long": (b'{"id": "b", "content": "' + b"x" * MAX_LINE_BYTES + b'"}\n', "10 MB"),
    "endless": (b"x" * (2 * MAX_LINE_BYTES), "10 MB"),
    "nested too deeply": (b'{"id": "b", "content": "x", "metadata": ' + b"[" * 100_000 + b"\n", "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_line_is_named(tmp_path, case):
    bad, reason = BAD[case]
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + bad)
    with pytest.raises(UserError) as error:
        read_documents(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and reason in message
    assert "\n" not in message and len(message) < 400
    assert ";" in message  # what is wrong; what to do


def test_text_that_spells_an_escape_is_not_taken_for_one(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        line(id="a", content="C strings end in \\u0000, \\ud800 is half a pair") + line(id="\u00e9", content="é")
    )
    assert len(read_documents(path)) == 2


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_file_without_documents_is_refused(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no documents"):
        read_documents(path)


def test_missing_file_and_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_documents(path)


QUERY = {"id": "q", "query": "who?", "answers": ["x"], "doc_ids": ["a"]}


def test_queries_are_read_as_they_are(tmp_path):
    queries = [QUERY, {**QUERY, "id": "r", "answers": [], "doc_ids": [], "hops": [{"query": "h", "doc_ids": ["a"]}]}]
    write_jsonl(tmp_path / "q.jsonl", queries)
    assert read_queries(tmp_path / "q.jsonl") == queries


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": ""}, '"id"'),
        ({"id": None}, '"id" is null'),
        ({"query": 3}, '"query" is the number 3'),
        ({"answers": "x"}, '"answers"'),
        ({"answers": [1]}, '"answers"'),
        ({"doc_ids": None}, '"doc_ids"'),
        ({"hops": {}}, '"hops"'),
        ({"hops": [{"query": "h"}]}, "hop 1"),
        ({"hops": ["h"]}, "hop 1"),
    ],
)
def test_bad_query_is_named(tmp_path, change, reason):
    write_jsonl(tmp_path / "q.jsonl", [{**QUERY, "id": "first"}, {**QUERY, **change}])
    with pytest.raises(UserError, match=f"q.jsonl:2: .*{reason}"):
        read_queries(tmp_path / "q.jsonl")


def test_missing_query_fields_and_duplicate_ids_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    for name in QUERY:
        write_jsonl(path, [{key: value for key, value in QUERY.items() if key != name}])
        with pytest.raises(UserError, match=f'q.jsonl:1: "{name}" is missing'):
            read_queries(path)
    write_jsonl(path, [QUERY, QUERY])
    with pytest.raises(UserError, match=r"q.jsonl:2: .*line 1"):
        read_queries(path)
