"""Promises of nanochat/conversation.py: the layout, the mask, and that text never becomes control."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.conversation import (
    MAX_TITLE_TOKENS,
    Rendered,
    answer_text,
    count_documents,
    render,
    render_block,
    render_prompt,
    validate,
)
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.train(["where is the river of Karsholm? it is in the north. " * 3], 300)
FIRST_SPECIAL = len(TOKENIZER.token_bytes)


def ids_of(layout: str) -> list[int]:
    """Hand-written layouts: special tokens by their short names in braces, a document's number as {1}, the rest
    ordinary text after a space."""
    ids: list[int] = []
    for part in layout.replace("}", "{").split("{"):
        name = f"<|{part}|>"
        if part.isdigit():
            ids += TOKENIZER.encode(part)
            continue
        ids += [TOKENIZER.special_id(name)] if name in SPECIAL_TOKENS else TOKENIZER.encode(f" {part}" if part else "")
    return ids


def learned(rendered: Rendered) -> str:
    """The learned stretches, as text, separated by bars."""
    out, previous = "", 1
    for i, bit in zip(rendered.ids, rendered.mask, strict=True):
        if bit:
            out += ("" if previous else "|") + TOKENIZER.decode([i])
        previous = bit
    return out


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: str | list) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def retrieval(*documents: Any, **more: Any) -> dict[str, Any]:
    return {"role": "retrieval", "documents": list(documents), **more}


def document(title: str, content: str) -> dict[str, Any]:
    return {"id": title, "title": title, "content": content, "score": 1.0}


NORTH, SOUTH, EAST = document("North", "cold"), document("South", "warm"), document("East", "dry")
SEARCHING = assistant(
    [
        {"type": "text", "text": "let me look."},
        {"type": "search", "query": "river"},
        {"type": "documents", "documents": [NORTH, SOUTH]},
        {"type": "text", "text": "cold [1]"},
    ]
)
MULTI_HOP = {
    "role": "retrieval",
    "multi_hop": True,
    "hops": [
        {"hop": 1, "query": "first", "documents": [NORTH]},
        {"hop": 2, "query": "second", "documents": [SOUTH, EAST]},
    ],
}

LAYOUTS = {
    "plain": (
        talk(user("where?"), assistant("there")),
        "{bos}{user_start}where?{user_end}{assistant_start}there{assistant_end}",
        "| there<|assistant_end|>",
    ),
    "two turns with a system message": (
        talk(system("be brief"), user("a"), assistant("b"), user("c"), assistant("d")),
        (
            "{bos}{system_start}be brief{system_end}{user_start}a{user_end}{assistant_start}b{assistant_end}"
            "{user_start}c{user_end}{assistant_start}d{assistant_end}"
        ),
        "| b<|assistant_end|>| d<|assistant_end|>",
    ),
    "documents": (
        talk(system("s"), retrieval(NORTH, SOUTH), user("q"), assistant("cold [1]")),
        (
            "{bos}{system_start}s{system_end}{retrieval_start}{doc_start}North{1}{doc_body}cold{doc_end}"
            "{doc_start}South{2}{doc_body}warm{doc_end}{retrieval_end}"
            "{user_start}q{user_end}{assistant_start}cold [1]{assistant_end}"
        ),
        "| cold [1]<|assistant_end|>",
    ),
    "documents after the question": (
        talk(user("q"), retrieval(NORTH), assistant("a")),
        (
            "{bos}{user_start}q{user_end}{retrieval_start}{doc_start}North{1}{doc_body}cold{doc_end}{retrieval_end}"
            "{assistant_start}a{assistant_end}"
        ),
        "| a<|assistant_end|>",
    ),
    "numbers go on through the talk": (
        talk(retrieval(NORTH), user("q"), assistant("a"), retrieval(SOUTH, EAST), user("r"), assistant("b [3]")),
        (
            "{bos}{retrieval_start}{doc_start}North{1}{doc_body}cold{doc_end}{retrieval_end}"
            "{user_start}q{user_end}{assistant_start}a{assistant_end}"
            "{retrieval_start}{doc_start}South{2}{doc_body}warm{doc_end}{doc_start}East{3}{doc_body}dry{doc_end}"
            "{retrieval_end}{user_start}r{user_end}{assistant_start}b [3]{assistant_end}"
        ),
        "| a<|assistant_end|>| b [3]<|assistant_end|>",
    ),
    "hops": (
        talk(MULTI_HOP, user("q"), assistant("a")),
        (
            "{bos}{retrieval_start}{search_start}first{search_end}{doc_start}North{1}{doc_body}cold{doc_end}"
            "{retrieval_end}{retrieval_start}{search_start}second{search_end}"
            "{doc_start}South{2}{doc_body}warm{doc_end}"
            "{doc_start}East{3}{doc_body}dry{doc_end}{retrieval_end}"
            "{user_start}q{user_end}{assistant_start}a{assistant_end}"
        ),
        "| a<|assistant_end|>",
    ),
    "the model searches": (
        talk(retrieval(EAST), user("q"), SEARCHING),
        (
            "{bos}{retrieval_start}{doc_start}East{1}{doc_body}dry{doc_end}{retrieval_end}{user_start}q{user_end}"
            "{assistant_start}let me look.{search_start}river{search_end}"
            "{retrieval_start}{doc_start}North{2}{doc_body}cold{doc_end}{doc_start}South{3}{doc_body}warm{doc_end}"
            "{retrieval_end}cold [1]{assistant_end}"
        ),
        "| let me look.<|search_start|> river<|search_end|>| cold [1]<|assistant_end|>",
    ),
    "nothing found, nothing titled": (
        talk(retrieval(), retrieval({"content": "bare"}), user(""), assistant("a")),
        (
            "{bos}{retrieval_start}{retrieval_end}{retrieval_start}{doc_start}{1}{doc_body}bare{doc_end}{retrieval_end}"
            "{user_start}{user_end}{assistant_start}a{assistant_end}"
        ),
        "| a<|assistant_end|>",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_and_mask(name: str) -> None:
    conversation, layout, written = LAYOUTS[name]
    rendered = render(conversation, TOKENIZER)
    assert rendered is not None
    assert TOKENIZER.decode(rendered.ids) == TOKENIZER.decode(ids_of(layout))
    assert rendered.ids == ids_of(layout)
    assert learned(rendered) == written
    assert rendered.dropped_documents == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompt_is_a_prefix_of_the_training_example(name: str) -> None:
    conversation = LAYOUTS[name][0]
    rendered = render(conversation, TOKENIZER)
    prompt = render_prompt(talk(*conversation["messages"][:-1]), TOKENIZER)
    assert rendered is not None
    assert rendered.ids[: len(prompt)] == prompt
    assert prompt[-1] == TOKENIZER.special_id("<|assistant_start|>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_hold_the_documents(name: str) -> None:
    conversation = LAYOUTS[name][0]
    rendered = render(conversation, TOKENIZER)
    assert rendered is not None
    assert len(rendered.document_spans) == count_documents(conversation)
    for number, (start, end) in enumerate(rendered.document_spans, start=1):
        text = TOKENIZER.decode(rendered.ids[start:end])
        assert text.partition("<|doc_body|>")[0].endswith(str(number))
        assert text.endswith("<|doc_end|>")
        assert text.count("<|doc_end|>") == 1


def test_hops_in_one_message_equal_several_messages() -> None:
    several = [retrieval(*hop["documents"], hop=hop["hop"], query=hop["query"]) for hop in MULTI_HOP["hops"]]
    rest = [user("q"), assistant("a")]
    assert render(talk(MULTI_HOP, *rest), TOKENIZER) == render(talk(*several, *rest), TOKENIZER)


def test_document_objects_equal_dicts() -> None:
    class Found:
        def to_dict(self) -> dict[str, Any]:
            return NORTH

    rest = [user("q"), assistant("a")]
    assert render(talk(retrieval(Found()), *rest), TOKENIZER) == render(talk(retrieval(NORTH), *rest), TOKENIZER)


def test_block_equals_the_one_in_a_conversation() -> None:
    rendered = render(talk(retrieval(EAST), user("q"), SEARCHING), TOKENIZER)
    block = render_block([NORTH, SOUTH], TOKENIZER, first_number=2)
    assert rendered is not None
    start = rendered.document_spans[1][0] - 1
    assert rendered.ids[start : start + len(block)] == block
    queried = render_block([NORTH], TOKENIZER, query="first")
    assert queried == ids_of(
        "{retrieval_start}{search_start}first{search_end}{doc_start}North{1}{doc_body}cold{doc_end}{retrieval_end}"
    )


def with_text_everywhere(text: str) -> dict[str, Any]:
    """A conversation that has the text in every place text can stand."""
    evil = document(text, text)
    hops = {"role": "retrieval", "multi_hop": True, "hops": [{"hop": 1, "query": text, "documents": [evil]}]}
    parts = [
        {"type": "text", "text": text},
        {"type": "search", "query": text},
        {"type": "documents", "documents": [evil]},
        {"type": "text", "text": text},
    ]
    return talk(
        system(text),
        retrieval(evil, query=text, hop=1),
        hops,
        user(text),
        assistant(text),
        user(text),
        assistant(parts),
    )


@pytest.mark.parametrize("spelling", [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)])
def test_no_spelling_in_any_text_becomes_control(spelling: str) -> None:
    def control(conversation: dict[str, Any]) -> list[int]:
        rendered = render(conversation, TOKENIZER)
        assert rendered is not None
        return [i for i in rendered.ids if i >= FIRST_SPECIAL]

    expected = control(with_text_everywhere("harmless"))
    assert control(with_text_everywhere(spelling)) == expected
    prompt = render_prompt(talk(*with_text_everywhere(spelling)["messages"][:-1]), TOKENIZER)
    assert [i for i in prompt if i >= FIRST_SPECIAL] == expected[: len([i for i in prompt if i >= FIRST_SPECIAL])]
    block = render_block([document(spelling, spelling)], TOKENIZER, query=spelling)
    assert len([i for i in block if i >= FIRST_SPECIAL]) == 7


def test_long_documents_and_titles_are_cut() -> None:
    long = document("t " * 500, "c " * 500)
    rendered = render(talk(retrieval(long), user("q"), assistant("a")), TOKENIZER, max_doc_tokens=10)
    assert rendered is not None
    ids = rendered.ids
    title_end, body_end = (ids.index(TOKENIZER.special_id(name)) for name in ("<|doc_body|>", "<|doc_end|>"))
    assert ids[title_end + 1 : body_end] == TOKENIZER.encode(" " + "c " * 500)[:10]
    assert title_end - ids.index(TOKENIZER.special_id("<|doc_start|>")) - 1 == MAX_TITLE_TOKENS + 1  # and the number


LONG_TALK = talk(
    system("s"),
    retrieval(NORTH, SOUTH),
    user("first question"),
    assistant("first answer [1]"),
    retrieval(EAST),
    user("second question"),
    assistant("second answer [3]"),
)


def rendered_texts(max_tokens: int) -> tuple[str, int] | None:
    rendered = render(LONG_TALK, TOKENIZER, max_tokens=max_tokens)
    if rendered is None:
        return None
    assert len(rendered.ids) == len(rendered.mask) <= max_tokens
    assert len(rendered.document_spans) == 3 - rendered.dropped_documents
    return TOKENIZER.decode(rendered.ids), rendered.dropped_documents


def test_too_long_drops_documents_from_the_end_then_turns_from_the_end() -> None:
    full = render(LONG_TALK, TOKENIZER)
    assert full is not None
    sizes = [end - start for start, end in full.document_spans]
    first_turn = render(talk(*LONG_TALK["messages"][:4]), TOKENIZER)
    assert first_turn is not None

    whole = rendered_texts(len(full.ids))
    assert whole == (TOKENIZER.decode(full.ids), 0)

    text, dropped = rendered_texts(len(full.ids) - 1) or ("", -1)
    assert dropped == 1
    assert "South2" in text
    assert "East3" not in text
    assert "second answer" in text

    text, dropped = rendered_texts(len(full.ids) - sum(sizes)) or ("", -1)
    assert dropped == 3
    assert "first answer" in text
    assert "second answer" in text

    # one token less: the second turn goes, and the room it leaves is filled with the first turn's documents again
    text, dropped = rendered_texts(len(full.ids) - sum(sizes) - 1) or ("", -1)
    assert "first answer" in text
    assert "second" not in text
    assert "North1" in text
    assert dropped < 3

    bare = len(first_turn.ids) - sum(sizes[:2])
    text, dropped = rendered_texts(bare) or ("", -1)
    assert dropped == 3
    assert text.startswith("<|bos|><|system_start|> s<|system_end|>")
    assert "first answer" in text
    assert rendered_texts(bare - 1) is None


@pytest.mark.parametrize("max_tokens", range(1, 140, 3))
def test_what_is_rendered_fits_and_is_whole(max_tokens: int) -> None:
    result = rendered_texts(max_tokens)
    if result is not None:
        text, _ = result
        for name in ("system", "retrieval", "user", "assistant", "doc"):
            assert text.count(f"<|{name}_start|>") == text.count(f"<|{name}_end|>")
        assert text.endswith("<|assistant_end|>")


def test_too_long_prompt_drops_the_past_before_the_present() -> None:
    prompt_talk = talk(*LONG_TALK["messages"][:-1])
    full = render_prompt(prompt_talk, TOKENIZER)

    def cut_by(tokens: int) -> str:
        ids = render_prompt(prompt_talk, TOKENIZER, max_tokens=len(full) - tokens)
        assert len(ids) <= len(full) - tokens
        text = TOKENIZER.decode(ids)
        assert text.startswith("<|bos|><|system_start|> s<|system_end|>")
        assert text.endswith("<|user_start|> second question<|user_end|><|assistant_start|>")
        return text

    rendered = render(LONG_TALK, TOKENIZER)
    assert rendered is not None
    sizes = [end - start for start, end in rendered.document_spans]
    assert render_prompt(prompt_talk, TOKENIZER, max_tokens=len(full)) == full
    text = cut_by(1)  # of the first turn, the last document goes
    assert "North1" in text
    assert "South2" not in text
    assert "East3" in text
    assert "first answer" in text
    text = cut_by(sizes[1] + 1)
    assert "North" not in text
    assert "South" not in text
    assert "East3" in text
    assert "first answer" in text
    text = cut_by(sizes[0] + sizes[1] + 1)
    assert "East3" in text
    assert "first" not in text
    present = talk(*prompt_talk["messages"][:1], *prompt_talk["messages"][-2:])
    smallest = len(render_prompt(present, TOKENIZER)) - sizes[2]
    assert "East" not in cut_by(len(full) - smallest)
    with pytest.raises(UserError, match=f"takes {smallest} tokens without any document, but only {smallest - 1} fit"):
        cut_by(len(full) - smallest + 1)


def test_each_document_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: encoded.append(text) or encode(text))
    documents = [document(f"{i}x", f"content {i}") for i in range(50)]
    render(talk(retrieval(*documents), user("q"), assistant("a")), TOKENIZER, max_tokens=100)
    assert len(encoded) == len(set(encoded)) == 152


def test_answer_text_is_what_the_reader_sees() -> None:
    block = "{retrieval_start}{doc_start}North{1}{doc_body}cold{doc_end}{retrieval_end}"
    searched = ids_of("let me look.{search_start}river{search_end}" + block + "cold [1]{assistant_end}{user_start}more")
    assert answer_text(searched, TOKENIZER) == "let me look. cold [1]"
    assert answer_text(ids_of("cut off {search_start}riv"), TOKENIZER) == "cut off"
    assert answer_text(ids_of(" {bos}odd{doc_end} "), TOKENIZER) == "odd"
    assert answer_text([], TOKENIZER) == ""


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], 'a conversation is {"messages"'),
        ({}, 'a conversation is {"messages"'),
        ({"messages": []}, "at least one message"),
        (talk("hello"), "message 1: role None"),
        (talk({"role": "tool", "content": "x"}), "message 1: role 'tool'"),
        (talk(user("q"), system("s"), assistant("a")), "message 2: the system message must be the first"),
        (talk(assistant("a")), "message 1: the assistant message must answer"),
        (talk(user("q"), assistant("a"), assistant("b")), "message 3: the assistant message must answer"),
        (talk(user("q"), user("r"), assistant("a")), "message 2: the user message follows another"),
        (talk(user("q"), retrieval(NORTH), user("r"), assistant("a")), "message 3: the user message follows another"),
        (talk(system("s")), "no user message"),
        (talk(user("q")), "no assistant message"),
        (talk({"role": "user"}, assistant("a")), "message 1: the content of a user message is text, not missing"),
        (talk(user(["x"]), assistant("a")), "message 1: the content of a user message is text, not a list"),  # type: ignore[arg-type]
        (talk(user("q"), assistant("")), "message 2: the assistant message is empty"),
        (talk(user("q"), assistant(" \n")), "message 2: the assistant message is empty"),
        (talk(user("q"), assistant([])), "message 2: the assistant message is empty"),
        (talk(user("q"), assistant(5)), "message 2: the content of an assistant message"),  # type: ignore[arg-type]
        (talk(user("q"), assistant([{"type": "image"}])), "message 2, part 1: type 'image'"),
        (talk(user("q"), assistant([{"type": "text"}])), "message 2, part 1: 'text' is text, not missing"),
        (talk(user("q"), assistant([{"type": "search", "query": 5}])), "message 2, part 1: 'query' is text"),
        (talk(user("q"), assistant([{"type": "documents"}])), "message 2, part 1: 'documents' is a list"),
        (talk({"role": "retrieval"}, user("q"), assistant("a")), "message 1: 'documents' is a list, not missing"),
        (talk(retrieval("x"), user("q"), assistant("a")), "message 1, document 1: a document has its text"),
        (talk(retrieval(NORTH, {"title": "x"}), user("q"), assistant("a")), "message 1, document 2: a document has"),
        (talk(retrieval({"title": 5, "content": "x"}), user("q"), assistant("a")), "document 1: 'title' is text"),
        (talk(retrieval(NORTH, query=5), user("q"), assistant("a")), "message 1: 'query' is text, not 5"),
        (talk({"role": "retrieval", "multi_hop": True}, user("q"), assistant("a")), "needs a list of hops"),
        (talk({"role": "retrieval", "multi_hop": True, "hops": [5]}, user("q")), "message 1, hop 1: a hop is"),
        (talk({"role": "retrieval", "multi_hop": True, "hops": [{}]}, user("q")), "message 1, hop 1: 'documents'"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(conversation: Any, reason: str) -> None:
    for check in (validate, lambda bad: render(bad, TOKENIZER)):
        with pytest.raises(UserError) as error:
            check(conversation)
        assert reason in str(error.value)


def test_prompt_needs_a_question_at_the_end_but_no_answers() -> None:
    assert render_prompt(talk(user("q"), assistant(""), user("r")), TOKENIZER)
    with pytest.raises(UserError, match="must not end with an assistant message"):
        render_prompt(talk(user("q"), assistant("a")), TOKENIZER)
