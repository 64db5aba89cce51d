"""SQuAD files as documents and queries, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from tasks.squad import read_squad

PASSAGE = "The old bridge was built in 1931.\u2028It is red, said O\u2019Neil."


def question(id: str, *answers: str, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "question": f" Question {id}? ",
        "answers": [{"text": a, "answer_start": 0} for a in answers],
        **more,
    }


def squad_file() -> dict[str, Any]:
    bridge = {"context": PASSAGE, "qas": [question("q1", "1931", "1931", "in 1931"), question("q2", "red")]}
    again = {"context": PASSAGE, "qas": [question("q3", "O\u2019Neil")]}
    river = {"context": "The river is long.", "qas": [question("q4", "river", is_impossible=False)]}
    impossible = question("q5", is_impossible=True, plausible_answers=[{"text": "long", "answer_start": 13}])
    other = {"context": "The river is long.", "qas": [impossible]}
    return {
        "version": "v2.0",
        "data": [
            {"title": "Caf%C3%A9_Bridge", "paragraphs": [bridge, again, river]},
            {"title": "River", "paragraphs": [other]},
        ],
    }


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_passages_once_and_answers_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = b"\xef\xbb\xbf" + json.dumps(squad_file(), ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    bridge, river = read_squad(path)
    assert [bridge.title, river.title] == ["Café Bridge", "River"]
    assert [document.content for document in bridge.documents] == [PASSAGE, "The river is long."]
    assert {document.title for document in bridge.documents} == {"Café Bridge"}
    first, second = (document.id for document in bridge.documents)
    assert bridge.queries == [
        {"id": "q1", "query": "Question q1?", "answers": ["1931", "in 1931"], "doc_ids": [first]},
        {"id": "q2", "query": "Question q2?", "answers": ["red"], "doc_ids": [first]},
        {"id": "q3", "query": "Question q3?", "answers": ["O\u2019Neil"], "doc_ids": [first]},
        {"id": "q4", "query": "Question q4?", "answers": ["river"], "doc_ids": [second]},
    ]
    assert river.queries == [{"id": "q5", "query": "Question q5?", "answers": [], "doc_ids": []}]
    assert river.documents[0].id != second  # the same words under another title are another document


def test_ids_depend_on_the_passage_and_not_on_its_place(tmp_path: Path) -> None:
    content = squad_file()
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    ids = {document.content: document.id for document in read_squad(path)[0].documents}
    content["data"][0]["paragraphs"].reverse()
    path.write_text(json.dumps(content))
    assert {document.content: document.id for document in read_squad(path)[0].documents} == ids
    assert ids["The river is long."] == "squad_f8c3564088c1d0fa"  # ids are in files: they must not change


def break_at(*steps: Any, value: Any = None) -> dict[str, Any]:
    """The file with one place changed, or removed where no value is given."""
    content = place = squad_file()
    for step in steps[:-1]:
        place = place[step]
    if value is None:
        del place[steps[-1]]
    else:
        place[steps[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, 'not a SQuAD file \\(no "data" list\\)'),
        ({"data": []}, "no questions"),
        (break_at("data", 1, "title"), 'data\\[1\\]: "title"'),
        (break_at("data", 0, "paragraphs", 2, "context", value=" "), 'data\\[0\\].paragraphs\\[2\\]: "context"'),
        (break_at("data", 0, "paragraphs", 0, "qas", 1, "question"), 'paragraphs\\[0\\].qas\\[1\\]: "question"'),
        (break_at("data", 0, "paragraphs", 0, "qas", 1, "answers", value=[]), "qas\\[1\\]: no answers"),
        (break_at("data", 0, "paragraphs", 0, "qas", 1, "id", value="q1"), "qas\\[1\\]: id 'q1' was used before"),
    ],
)
def test_wrong_content_is_located(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"bad.json.*{message}"):
        read_squad(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{\n"data": [', r":2: not JSON"),
        (gzip.compress(b'{"data": []}', mtime=0)[:-9], "damaged gzip file"),
        (b'{"data": [\n"\xff"]}', r":2: not UTF-8 \(byte 0xff\)"),
        (b'{"data": ["\\ud800"]}', "half a surrogate pair"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_unreadable_files_give_one_clear_line(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"bad.json.*{message}"):
        read_squad(path)
