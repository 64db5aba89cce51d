"""Questions about documents that come without: what the rules ask, what is kept of what a model writes."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from nanochat.common import UserError
from nanochat.conversation import validate
from nanochat.retrieval.document import Document
from tasks.own_documents import passages, split, write_questions
from tasks.own_files import Text
from tasks.question_rules import write_by_rules
from tasks.question_writers import check, make_writer, parse, prompt, writing_example


def document(content: str, title: str = "Ada Lind", id: str = "d") -> Document:
    return Document(id, title, content)


@pytest.mark.parametrize(
    ("sentence", "pair"),
    [
        ("Ada Lind (born 3 May 1901 in Vienna) was an Austrian engineer and writer.",
         ("Who was Ada Lind?", "an Austrian engineer and writer")),
        ("The Lind Bridge is a steel bridge in Norland that was built by hand.",
         ("What is the Lind Bridge?", "a steel bridge in Norland")),
        ("The bridge was finally built in 1904.", ("According to Ada Lind, when was the bridge finally built?", None)),
        ("However, the Lind Bridge was built over the river on 3 May 1904.",
         ("When was the Lind Bridge built over the river?", "3 May 1904")),
        ("The Lind Bridge was opened in Old Haven by the mayor.",
         ("Where was the Lind Bridge opened?", "Old Haven")),
        ("The Lind Bridge was designed by Otto van Berg.",
         ("By whom was the Lind Bridge designed?", "Otto van Berg")),
        ("She was born in Vienna.", ("Where was Ada Lind born?", "Vienna")),
        ("The Lind Bridge has about 1,200 lamps.", ("How many lamps does the Lind Bridge have?", "1,200")),
        ("Otto Berg designed the bridge over the river, which is long.",
         ("According to Ada Lind, who designed the bridge over the river?", "Otto Berg")),
        ("It joined the Union of Norland Engineers (UNE).", ("What does UNE stand for?", "Union of Norland Engineers")),
        ("- Dry weight: 12 kg", ("What is the dry weight of Ada Lind?", "12 kg")),
        ("Otto Berg moved to Old Haven in 1904.", ("Otto Berg moved to Old Haven in which year?", "1904")),
    ],
)  # fmt: skip
def test_what_the_rules_ask(sentence, pair):
    question, answer = pair
    found = dict(write_by_rules(document(sentence), 10))
    if answer is None:  # "finally" is no part of a passive that is read
        assert question not in found
    else:
        assert found.get(question) == answer, found


def test_a_question_in_the_text_is_asked_with_what_follows():
    text = "1. How do I reset the device at home? Hold the button for ten seconds. 2. What next? Wait."
    assert dict(write_by_rules(document(text), 9))["How do I reset the device at home?"] == (
        "Hold the button for ten seconds"
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "This was built in 1904.",  # what?
        "In the middle ages the castle was an important fortified site.",
        "They were born in Vienna.",
        "When it rains, the Lind Bridge is a dangerous place.",
        "The song was written by him.",
        "Nothing to ask here at all.",
        "",
    ],
)
def test_what_cannot_be_asked_is_not(sentence):
    assert write_by_rules(document(sentence), 5) == []


def test_answers_are_words_of_the_text_and_as_many_as_asked():
    text = (
        "Ada Lind was an engineer of bridges. She was born in Vienna. She was awarded the prize in 1931. "
        "The Lind Bridge has 40 lamps. Otto Berg designed the tower of the bridge."
    )
    for count in (1, 3, 9):
        pairs = write_by_rules(document(text), count)
        assert len(pairs) == min(count, 5) and len(dict(pairs)) == len(pairs)
        assert all(answer in text and answer.lower() not in question.lower() for question, answer in pairs)


def test_it_takes_any_text():
    for text in ("(" * 5000, "A " * 5000, "x was " * 2000, "\n\n?!.", "<|doc_end|> was born in 1904."):
        write_by_rules(document(text, title=text[:50]), 3)


def test_what_a_model_writes_is_read_and_kept_where_it_is_true():
    written = """Sure! Here are the questions:
1. **Q:** When was the bridge built?
   **A:** 1904.
Question 2: Who built it
Answer: "ada lind"
Q: Where is it?
Q: What colour is it?
A: green
Q: When was the bridge built?
A: 1905
A: stray"""
    pairs = parse(written)
    assert pairs == [
        ("When was the bridge built?", "1904"),
        ("Who built it", "ada lind"),
        ("What colour is it?", "green"),
        ("When was the bridge built?", "1905"),
    ]
    about = document("The bridge was built in\n1904 by Ada  Lind, not in 1905.")
    assert check(about, pairs, 5) == [("When was the bridge built?", "1904"), ("Who built it?", "Ada Lind")]
    assert check(about, pairs, 1) == [("When was the bridge built?", "1904")]
    assert check(about, [("Who built the bridge?", " ")], 5) == []
    example = writing_example(about, pairs[:2])
    validate(example)
    assert parse(example["messages"][1]["content"]) == pairs[:2]
    assert prompt(about, 2) == example["messages"][0]["content"] and about.content in prompt(about, 2)


class Api(BaseHTTPRequestHandler):
    """A server of OpenAI's kind that writes a question about what it is shown."""

    asked: ClassVar[list[dict]] = []

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "writer-1", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        last = body["messages"][-1]["content"].split()[-1]
        message = {"role": "assistant", "content": f"Q: Which word is the last?\nA: {last}\nQ: Who lies?\nA: nobody"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "writer-1", "choices": [choice]})

    def reply(self, data: dict) -> None:
        payload = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_of_openais_kind_writes(monkeypatch):
    pytest.importorskip("openai")
    server = HTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        found = make_writer(address)([document("one two three"), document("four five")], 2)
        assert found == [[("Which word is the last?", "three")], [("Which word is the last?", "five")]]
        assert {body["model"] for body in Api.asked} == {"writer-1"} and len(Api.asked) == 2
        make_writer(address, "other")([document("one two")], 1)
        assert Api.asked[-1]["model"] == "other"
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.0)
    with pytest.raises(UserError, match="did not answer"):
        make_writer(address, "other")([document("one")], 1)
    with pytest.raises(UserError, match="writer_model"):
        make_writer(address)


def test_a_model_of_transformers_writes(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    shape = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=1, eos_token_id=1, bos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    seen = []
    parsed = lambda text: seen.append(text) or [("What is the first?", "a")]  # noqa: E731
    monkeypatch.setattr("tasks.question_writers.parse", parsed)
    found = make_writer(f"hf:{tmp_path}", device="cpu")([document("a b"), document("b b")], 1)
    assert found == [[("What is the first?", "a")], []] and len(seen) == 2
    with pytest.raises(UserError, match="cannot be loaded"):
        make_writer(f"hf:{tmp_path / 'none'}")
    for wrong in ("ruler", "hf:", "ftp://x"):
        with pytest.raises(UserError, match="no writer"):
            make_writer(wrong)


def test_passages_know_where_they_are_from():
    content = "Intro " * 30 + "\n\nSize\n\n" + "Twelve metres is the size. " * 12
    at = content.index("Size")
    texts = [
        Text("a.md", "The bridge", content, "a.md", [(at, "Size")]),
        Text("b.pdf", "Other", "Page one.\n\nPage two says more.", "b.pdf", metadata={"pages": [0, 11]}),
        Text("c.txt", "Copy", content, "c.txt", [(at, "Size")]),
    ]
    found, repeats = passages(texts, 40, 0, lambda texts: [len(text.split()) for text in texts])
    assert repeats > 0 and not any(document.id.startswith("c.txt") for document in found)
    for one in found:
        text = next(text for text in texts if text.id == one.metadata["text"])
        assert one.content == text.content[one.metadata["start"] : one.metadata["end"]] and one.source == text.source
    assert {one.title for one in found} == {"The bridge", "The bridge: Size", "Other"}
    assert [one.id for one in found if one.source == "b.pdf"] == ["b.pdf"] and found[-1].metadata["page"] == 1


def test_questions_of_two_passages_are_one_or_none():
    said = {"x": [("Who?", "A"), ("When?", "1")], "y": [("Who?", "B"), ("When?", "1")]}
    documents = [document("-", id=id) for id in said]
    queries = write_questions(documents, lambda some, count: [said[d.id] for d in some], 2)
    assert queries == [{"id": "q0", "query": "When?", "answers": ["1"], "doc_ids": ["x", "y"]}]


def test_held_out_questions_are_about_other_files():
    documents = [Document(f"{f}#{n}", "", "-", metadata={"text": str(f)}) for f in range(20) for n in range(3)]
    queries = [{"id": d.id, "query": d.id, "answers": ["-"], "doc_ids": [d.id]} for d in documents]
    parts = split(queries, documents, 0)
    files = {name: {query["id"].split("#")[0] for query in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 60 and {name: len(of) for name, of in files.items()} == {
        "train": 16, "val": 2, "test": 2
    }  # fmt: skip
    assert not files["train"] & (files["val"] | files["test"]) and not files["val"] & files["test"]
    train, test = (parts[name][0]["doc_ids"][0] for name in ("train", "test"))
    both = {"id": "both", "query": "both", "answers": ["-"], "doc_ids": [train, test]}
    assert split([*queries, both], documents, 0) == parts  # it would tell of a held-out file
    few = split(queries[:9], documents[:9], 0)  # three files: by passage
    assert {name: len(part) for name, part in few.items()} == {"train": 7, "val": 1, "test": 1}
    assert split(queries[:2], documents[:2], 0) == {}
