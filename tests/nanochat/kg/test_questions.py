"""Questions from every kind of file."""

from __future__ import annotations

import gzip
import json

import pytest

from nanochat.common import UserError
from nanochat.kg.questions import read_questions

WEBQSP = {
    "Questions": [
        {
            "QuestionId": "WebQTrn-0",
            "RawQuestion": "What is it?",
            "ProcessedQuestion": "what is it",
            "Parses": [
                {"TopicEntityMid": "m.01", "Answers": [{"AnswerArgument": "m.02", "EntityName": "Two"}]},
                {"TopicEntityMid": "m.01", "Answers": [{"AnswerArgument": "m.02"}, {"AnswerArgument": "1999"}]},
                {"TopicEntityMid": None, "Answers": []},
            ],
        }
    ]
}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "qa.txt",
            "who acted in [A B]\tC|D\n\nwhat | [E]\tF\n",
            [("1", "who acted in [A B]", ["C", "D"], []), ("3", "what | [E]", ["F"], [])],
        ),
        ("q.jsonl", '{"id": "x", "query": "q?", "answers": ["a"], "doc_ids": []}\n', [("x", "q?", ["a"], [])]),
        ("q.jsonl", '{"id": "x", "query": "q?", "answers": [], "topics": ["t"]}\n', [("x", "q?", [], ["t"])]),
        (
            "rog.jsonl",
            '{"id": "w", "question": "q", "answer": ["b"], "q_entity": ["t"], "a_entity": ["a"], "graph": []}\n',
            [("w", "q", ["a"], ["t"])],
        ),
        (
            "web.jsonl",
            '{"url": "http://www.freebase.com/view/en/justin_b", "question": "q", "answers": ["a"]}\n',
            [("1", "q", ["a"], ["justin b"])],
        ),
        ("WebQSP.json", json.dumps(WEBQSP), [("WebQTrn-0", "what is it", ["m.02", "1999"], ["m.01"])]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_formats(tmp_path, name, text, expected, packed):
    path = tmp_path / (name + ".gz" * packed)
    (gzip.open if packed else open)(path, "wt", encoding="utf-8").write(text)
    read = read_questions(path)
    assert [(q.id, q.text, q.answers, q.topics) for q in read] == expected
    assert all(str(path) in q.where for q in read)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("q.txt", "good\ta\nno answer\n", r"q.txt:2: no question and answers; a file may have"),
        ("q.jsonl", '{"query": "q", "answers": "a"}\n', r"q.jsonl:1: no question"),
        ("q.jsonl", '{"query": "q", "answers": [1]}\n', r"q.jsonl:1: no question"),
        ("q.jsonl", '{"text": "q"}\n', r"q.jsonl:1: no question"),
        ("q.jsonl", '{"query": "q", "answers": ["a"]\n', r"q.jsonl: no JSON"),
        (
            "q.jsonl",
            '{"id": "1", "query": "q", "answers": []}\n' * 2,
            r"q.jsonl:2: id '1' was used in .*q.jsonl:1 already",
        ),
        ("q.json", '{"a": 1}', r"q.json: not a list of questions"),
        ("q.json", '[{"QuestionId": "1", "Parses": [3]}]', r"q.json: question 1: no question"),
        ("q.txt", "\n", r"q.txt: no questions in it"),
    ],
)
def test_bad_files(tmp_path, name, text, error):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=error):
        read_questions(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing: No such file"):
        read_questions(tmp_path / "nothing")
