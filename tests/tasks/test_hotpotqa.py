"""HotpotQA files as pooled documents and queries with hops."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from tasks.hotpotqa import read_hotpotqa

FILM = ["Kiss (film)", ["Kiss is a film.", " It stars Ann Poe as the lead."]]
ACTOR = ["Ann Poe (actor)", ["Ann Poe was an actor.", "", "She became a mayor."]]
OTHER = ["Oak", ["An oak is a tree."]]


def record(id: str, gold: list[str], answer: str = "mayor", context: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "_id": id,
        "question": "What did the star of Kiss become?",
        "answer": answer,
        "type": "bridge",
        "supporting_facts": [[title, 0] for title in gold],
        "context": [OTHER, ACTOR, FILM] if context is None else context,
        **more,
    }


def write(path: Path, records: list[Any]) -> Path:
    text = json.dumps(records) if path.name.endswith(".json") else "".join(json.dumps(row) + "\n\n" for row in records)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["h.json", "h.jsonl", "h.jsonl.gz"])
def test_paragraphs_are_pooled_and_gold_is_by_title(tmp_path: Path, name: str) -> None:
    gold = ["Ann Poe (actor)", "Kiss (film)", "Ann Poe (actor)"]
    records = [record("a", gold), record("b", ["Oak", "Lost"]), record("c", ["Oak"], "a tree", [OTHER])]
    documents, queries, skipped = read_hotpotqa(write(tmp_path / name, records))
    assert [document.title for document in documents] == ["Oak", "Ann Poe (actor)", "Kiss (film)"]
    oak, actor, film = (document.id for document in documents)
    assert documents[1].content == "Ann Poe was an actor. She became a mayor."
    assert skipped == 1  # the paragraph "Lost" is not in the file
    assert queries == [
        {
            "id": "a",
            "query": "What did the star of Kiss become?",
            "answers": ["mayor"],
            "doc_ids": [film, actor],
            "hops": [
                {"query": "What did the star of Kiss become?", "doc_ids": [film]},
                {"query": "Ann Poe (actor)", "doc_ids": [actor]},
            ],
        },
        {"id": "c", "query": "What did the star of Kiss become?", "answers": ["a tree"], "doc_ids": [oak]},
    ]


@pytest.mark.parametrize(
    ("gold", "more"),
    [
        (["Kiss (film)", "Ann Poe (actor)"], {"type": "comparison"}),
        (["Kiss (film)", "Oak"], {}),  # the film does not speak of the oak
        (["Kiss (film)", "Ann Poe (actor)"], {"answer": "lead"}),  # what the bridge leads to does not hold the answer
        (["Kiss (film)", "Ann Poe (actor)"], {"answer": "ma"}),  # part of a word is not the answer
        (["Kiss (film)", "Ann Poe (actor)", "Oak"], {}),
    ],
)
def test_no_hops_where_no_bridge_is_clear(tmp_path: Path, gold: list[str], more: dict[str, Any]) -> None:
    _, (query,), _ = read_hotpotqa(write(tmp_path / "h.jsonl", [record("a", gold, **more)]))
    assert "hops" not in query
    assert len(query["doc_ids"]) == len(gold)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing in it|no question"),
        ([["x"]], "not a JSON object"),
        ([{"question": "?"}], 'no "_id"'),
        ([record("a", ["Oak"], answer="")], '"answer" is missing'),
        ([record("a", ["Oak"], context=[["Oak"]])], '"context" must be'),
        ([record("a", ["Oak"], context=["Oak", 3])], '"context" must be'),
        ([record("a", ["Oak"]), record("a", ["Oak"])], "'a' was used before"),
        ([record("a", ["Lost"])], "no question with all its gold paragraphs"),
    ],
)
@pytest.mark.parametrize("name", ["h.json", "h.jsonl"])
def test_wrong_content_is_located(tmp_path: Path, name: str, records: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*({message})"):
        read_hotpotqa(write(tmp_path / name, records))


def test_the_line_of_a_cut_file_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "h.jsonl", [record("a", ["Oak"])])
    path.write_text(path.read_text() + '{"_id": "b", ')
    with pytest.raises(UserError, match=r"h\.jsonl:3: not JSON"):
        read_hotpotqa(path)
