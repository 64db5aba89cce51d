"""Question sets with exactly the hub's columns, from files and through the datasets package."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.kg.graph import Graph
from nanochat.kg.hub import download
from nanochat.kg.questions import read_questions
from nanochat.kg.triples import read_facts

FACTS = [["Ann", "person.born_in", "Or"], ["Or", "place.in", "Land\nof\tX"], ["#1 Song", "song.by", "Ann"]]


def rog(id: str, graph: list, **more) -> dict:
    record = {"id": id, "question": f"{id}: where was Ann born?", "answer": ["Or"], "q_entity": ["Ann"]}
    return {**record, "a_entity": ["Or"], "graph": graph, "choices": [], **more}


SPLITS = {
    "train": [rog("a", FACTS[:2]), rog("b", FACTS[1:]), rog("c", [], a_entity=[], answer=["Land\nof\tX"])],
    "validation": [rog("d", [])],
    "test": [rog("e", [*FACTS, ["Ann", "", "Or"], ["Ann", "x"]])],
}


def write(folder: Path, kind: str, splits: dict[str, list[dict]]) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        if kind == "parquet":
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            for part, some in enumerate((rows[:1], rows[1:])):
                if some:
                    path = folder / "data" / f"{split}-0000{part}-of-00002-d810a36ed97bc2c5.parquet"
                    parquet.write_table(pyarrow.Table.from_pylist(some), path)
        else:
            path = folder / "data" / f"{split}.{kind}"
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (gzip.open if kind.endswith("gz") else open)(path, "wt").write(lines)
    (folder / "README.md").write_text("test")
    return folder


def hub(monkeypatch, load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "hub"])
def test_questions_and_the_union_of_their_facts(tmp_path, monkeypatch, capsys, kind):
    if kind == "hub":
        asked = []
        hub(monkeypatch, lambda name: asked.append(name) or SPLITS)
        download("cwq", tmp_path / "out")
        assert asked == ["rmanluo/RoG-cwq"]
    else:
        download("webqsp", tmp_path / "out", write(tmp_path / "in", kind, SPLITS))
    assert "facts: 3 different ones among 9, 2 that are none left out" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("facts.txt", "test.jsonl", "train.jsonl", "val.jsonl")
    ]
    facts = read_facts([tmp_path / "out/facts.txt"])
    assert not facts.counts
    graph = Graph.build(facts)
    wanted = [["Ann", "person.born_in", "Or"], ["Or", "place.in", "Land of X"], ["#1 Song", "song.by", "Ann"]]
    assert [graph.text(fact) for fact in range(3)] == ["|".join(fact) for fact in wanted]
    questions = [q for split in ("train", "val", "test") for q in read_questions(tmp_path / f"out/{split}.jsonl")]
    assert [q.id for q in questions] == [*"abcde"]
    assert questions[2].answers == ["Land of X"] and questions[0].answers == ["Or"]
    assert all(q.topics == ["Ann"] and q.text == f"{q.id}: where was Ann born?" for q in questions)


def test_questions_without_facts(tmp_path):
    url = "http://www.freebase.com/view/en/justin_b"
    rows = [{"url": url, "question": f"who {n}?", "answers": ["A", "B"]} for n in range(3)]
    source = write(tmp_path / "in", "jsonl", {"train": rows[:2], "test": rows[2:]})
    download("web_questions", tmp_path / "out", source)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]
    read = read_questions(tmp_path / "out/train.jsonl")
    assert [(q.id, q.text, q.answers, q.topics) for q in read] == [
        ("1", "who 0?", ["A", "B"], ["justin b"]),
        ("2", "who 1?", ["A", "B"], ["justin b"]),
    ]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (
            "other.jsonl",
            "{}",
            "no file in it is named like train-00000.* https://huggingface.co/datasets/rmanluo/RoG-webqsp",
        ),
        ("train.jsonl", '{"text": 1}', "train.jsonl:1: no question with answers; its columns are text"),
        (
            "train.jsonl",
            '{"question": "q", "answers": ["a"], "url": "x/y"}',
            "train.jsonl:1: no graph of facts beside the question; its columns are question, answers, url",
        ),
        ("test.jsonl", json.dumps(rog("a", FACTS)) + "\n{", "test.jsonl:2: no JSON"),
        ("test.jsonl.gz", "{", "test.jsonl.gz: cannot be read to its end"),
        ("test-00000-of-00001.parquet", "PAR1", "no parquet file that can be read .*; fetch it again"),
    ],
)
def test_bad_files_leave_nothing(tmp_path, name, text, error):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text)
    with pytest.raises(UserError, match=error):
        download("webqsp", tmp_path / "out", tmp_path / "in")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_hub_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "nanochat\[hf\]"; or fetch the files of https.*--source FOLDER'):
        download("webqsp", tmp_path)

    def refused(name: str):
        raise ConnectionError("no route")

    hub(monkeypatch, refused)
    with pytest.raises(UserError, match=r"web_questions cannot be had from the hub \(ConnectionError\): fetch"):
        download("web_questions", tmp_path)
