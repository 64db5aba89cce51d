"""Promises of nanochat/dataset.py: all texts of all kinds of file, in order; bad input named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import iter_texts, list_text_files, record_text


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "t"}, "t"),
        ({"id": "1", "title": "A", "text": "t", "src": "x"}, "A\n\nt"),
        ({"id": "1", "content": "c", "title": "A", "metadata": {"text": "no"}}, "A\n\nc"),
        ({"category": "qa", "response": "r", "context": "", "instruction": "i"}, "i\n\nr"),
        ({"instruction": "i", "context": "c", "response": "r"}, "i\n\nc\n\nr"),
        ({"dataset": "d", "prompt": "p", "completion": "c"}, "p\n\nc"),
        ({"id": "q", "query": "q", "answers": ["a", "b"], "doc_ids": ["x"]}, "q\n\na\n\nb"),
        ({"question": "q", "answer": "a"}, "q\n\na"),
        ({"question": "q", "answer": True}, "q"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, "u\n\na"),
        (
            {
                "messages": [
                    {"role": "retrieval", "documents": [{"id": "1", "title": "T", "content": "c"}]},
                    {"role": "retrieval", "multi_hop": True, "hops": [{"query": "h", "documents": [{"content": "d"}]}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "search", "query": "s"}]},
                ]
            },
            "T\n\nc\n\nd\n\nh\n\nx\n\ns",
        ),
        ({"text": ""}, ""),
        ({"id": "1"}, None),
        ({"text": 5}, None),
    ],
)
def test_record_text_takes_the_text_fields_in_reading_order(record: dict, text: str | None) -> None:
    assert record_text(record) == text


def test_every_file_of_a_directory_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "deep.jsonl", {"text": "three"})
    (tmp_path / "b.txt").write_text("two\nlines\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": " "}\n\n'))
    (tmp_path / "notes.md").write_text("not read")
    assert list(iter_texts(tmp_path)) == ["one", "two\nlines\n", "three"]
    assert list(iter_texts([tmp_path / "b.txt", str(tmp_path / "c")])) == ["two\nlines\n", "three"]


def test_lines_end_at_newline_only_and_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    texts = ["a\u2028b\x85c\x0bd\re", "plain"]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    assert list(iter_texts(path)) == texts


def test_long_plain_file_comes_in_bounded_texts_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MAX_TEXT_BYTES", 10)
    content = "".join(f"line {i} é日本\n" for i in range(20)) + "日" * 30
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    texts = list(iter_texts(tmp_path))
    assert "".join(texts) == content
    assert max(map(len, texts)) <= 10


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', 2, "not a line of JSON"),
        ("a.jsonl", b'\n\n["a"]\n', 3, "a line holds one JSON object"),
        ("a.jsonl", b'{"id": "1"}\n', 1, "no text field"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3', 2, "not a line of JSON"),
        ("a.jsonl", b'{"text": "\x00"}\n', 1, "a NUL byte"),
        ("a.jsonl", b"[" * 100_000 + b"\n", 1, "not a line of JSON"),
        ("a.txt", b"one\ntwo\nthree \xff\n", 3, "not UTF-8"),
        ("a.txt", b"one\ntwo \xc3", 2, "not UTF-8"),
        ("a.txt", b"one\ntwo\x00\n", 2, "a NUL byte"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"b" * 10_000_000 + b'"}\n', 2, "the line is over 10 MB"),
        ("a.jsonl", b'{"text": "' + "日".encode() * 4_000_000 + b'"}\n', 1, "the line is over 10 MB"),
        ("a.jsonl.gz", b'{"text": "a"}\n', 1, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], 10, "cannot be read"),
    ],
)
def test_bad_input_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, line: int, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(iter_texts(path))
    assert str(error.value).startswith(f"{path}:{line}: {reason}")


def test_what_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for paths, reason in [
        (tmp_path / "nope.txt", "does not exist"),
        (tmp_path / "a.parquet", "is not a kind of text file"),
        (tmp_path, "no text files in"),
        ([], "no text files given"),
    ]:
        with pytest.raises(UserError, match=reason):
            list_text_files(paths)
