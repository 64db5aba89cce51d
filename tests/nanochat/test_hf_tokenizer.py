"""The exported tokenizer and chat template against ours."""

from __future__ import annotations

import random

import pytest

from nanochat.common import UserError
from nanochat.conversation import render, render_prompt
from nanochat.hf_tokenizer import from_hf_tokenizer, to_hf_tokenizer
from nanochat.tokenizer import Tokenizer

pytest.importorskip("transformers")

PIECES = [
    "The",
    " bridge",
    "naïve",
    "Fluß",
    "東京",
    "🙂👩‍👩‍👧",
    "1987",
    "it's",
    "  ",
    "\n\n",
    "\t",
    "...",
    "—",
    "a_b",
    "²",
    "Ⅳ",
    "x<y|z>",
]


@pytest.fixture(scope="module")
def tokenizer():
    """With merges that meet (several ways to the same token), from text of more than one script."""
    rng = random.Random(0)
    return Tokenizer.train([" ".join(rng.choices(PIECES, k=30)) for _ in range(200)], 400)


@pytest.fixture(scope="module")
def exported(tokenizer):
    return to_hf_tokenizer(tokenizer, 512)


def some_text(rng: random.Random, low: int = 1) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(low, 8)))


def some_documents(rng: random.Random) -> list[dict]:
    titles = ["", "Route 6", "North", " Henry Ⅳ", "x²"]
    return [
        {"id": str(n), "title": rng.choice([*titles, some_text(rng)]), "content": some_text(rng, 0)}
        for n in range(rng.randint(0, 3))
    ]


def some_conversation(rng: random.Random) -> dict:
    messages = [{"role": "system", "content": some_text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.4:
            messages.append({"role": "retrieval", "documents": some_documents(rng)})
        elif kind < 0.6:
            hops = [{"hop": n, "query": some_text(rng), "documents": some_documents(rng)} for n in range(2)]
            messages.append({"role": "retrieval", "multi_hop": True, "hops": hops})
        messages.append({"role": "user", "content": some_text(rng)})
        answer = some_text(rng) + "."
        if rng.random() < 0.3:
            answer = [
                {"type": "search", "query": some_text(rng)},
                {"type": "documents", "documents": some_documents(rng)},
                {"type": "text", "text": some_text(rng) + "."},
            ]
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def test_texts_have_the_same_ids_and_come_back(tokenizer, exported):
    rng = random.Random(1)
    for _ in range(1000):
        text = some_text(rng)
        ids = exported(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text)
        assert exported.decode(ids) == text


def test_a_thousand_conversations_have_the_same_ids(tokenizer, exported):
    rng = random.Random(2)
    for n in range(1000):
        conversation = some_conversation(rng)
        ours = render(conversation, tokenizer).ids
        theirs = exported.apply_chat_template(conversation["messages"], tokenize=True, return_dict=False)
        assert theirs == ours, conversation
        if n % 10 == 0:
            question = conversation["messages"][:-1]
            asked = exported.apply_chat_template(question, tokenize=True, add_generation_prompt=True, return_dict=False)
            assert asked == render_prompt({"messages": question}, tokenizer)


def test_text_from_outside_is_never_control_there_either(tokenizer, exported):
    for name in tokenizer.special_tokens:
        documents = [{"id": "1", "title": f"A {name}", "content": f"{name} b{name}"}]
        messages = [{"role": "retrieval", "documents": documents}, {"role": "user", "content": f"say {name}"}]
        ids = exported.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        plain = [
            {"role": "retrieval", "documents": [{"id": "1", "title": "A", "content": "b"}]},
            messages[1] | {"content": "x"},
        ]
        count = lambda ids: sum(i >= len(tokenizer.token_bytes) for i in ids)  # noqa: E731
        assert count(ids) == count(render_prompt({"messages": plain}, tokenizer))


def test_import_gives_the_same_tokenizer(tokenizer, exported, tmp_path):
    exported.save_pretrained(tmp_path)
    assert from_hf_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer that was exported"):
        from_hf_tokenizer(tmp_path)
