"""The exported tokenizer and chat template against ours."""

from __future__ import annotations

import random

import pytest

from nanochat.common import UserError
from nanochat.conversation import render, render_prompt
from nanochat.dsi.model import QueryTokens
from nanochat.hf_tokenizer import OrdinaryText, from_hf_tokenizer, to_hf_tokenizer
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


def test_ordinary_text_for_tokenizers_of_others_never_controls():
    """A T5-like one, whose own encode finds "</s>" in any text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    plain.train_from_iterator(["the town of the river was built in 1987 by an old man </s> <extra_id_0>"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    )
    text = "the old town was built in 1987"
    assert OrdinaryText(tokenizer).encode(text) == tokenizer.encode(text, add_special_tokens=False)
    hostile = "old </s> man <extra_id_0><pad>"
    controls = {tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<extra_id_0>", "<pad>")}
    assert controls <= set(tokenizer.encode(hostile, add_special_tokens=False))
    assert not controls & set(OrdinaryText(tokenizer).encode(hostile))
    query = QueryTokens(tokenizer, "t5")(hostile)
    assert query.count(tokenizer.eos_token_id) == 1 == query.index(tokenizer.eos_token_id) / (len(query) - 1)
