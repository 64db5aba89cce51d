"""Search inside an answer: what is read, what is shown, where it stops, and that nothing is computed wrongly."""

from __future__ import annotations

import pytest
import torch

from nanochat import engine as engine_module
from nanochat.common import UserError
from nanochat.conversation import render, render_prompt
from nanochat.engine import Engine
from nanochat.metrics import ABSTENTION
from nanochat.retrieval import Document, RetrievalManager
from nanochat.searching import Request, Searching

DOCUMENTS = [
    Document("bridge", "The bridge", "The old bridge over the river was built in 1987 by Marrow."),
    Document("marrow", "Marrow", "Marrow is a town on the river Tull."),
    Document("tull", "Tull", "The river Tull is old and long, and has a bridge."),
    Document("other", "Other 7", "Nothing of that."),
]
QUESTION = {"messages": [{"role": "user", "content": "Which river has the town that built the bridge?"}]}


@pytest.fixture
def manager():
    return RetrievalManager("bm25", documents=DOCUMENTS)


class Scripted:
    """Has every request write given tokens, and keeps the logits that it would have chosen by."""

    def __init__(self, monkeypatch, tokenizer):
        self.tokenizer, self.scripts, self.logits = tokenizer, {}, {}
        monkeypatch.setattr(engine_module, "sample", self.sample)

    def write(self, *parts):
        """parts: text, ("search", query); then the end of the message."""
        special, ids = self.tokenizer.special_id, []
        for part in parts:
            text = part if isinstance(part, str) else part[1]
            encoded = self.tokenizer.encode(f" {text}") if text else []
            ids += (
                encoded if isinstance(part, str) else [special("<|search_start|>"), *encoded, special("<|search_end|>")]
            )
        seed = len(self.scripts)
        self.scripts[seed] = [*ids, special("<|assistant_end|>")]
        self.logits[seed] = []
        return seed

    def sample(self, logits, settings, draws, seen=None):
        chosen = []
        for row, setting in enumerate(settings):
            self.logits[setting.seed].append(logits[row].clone())
            chosen.append(self.scripts[setting.seed][len(self.logits[setting.seed]) - 1])
        return torch.tensor(chosen)


@pytest.fixture
def scripted(monkeypatch, small_tokenizer):
    return Scripted(monkeypatch, small_tokenizer)


@pytest.fixture
def engine(make_model, small_tokenizer):
    return Engine(make_model(small_tokenizer.vocab_size, pattern="MTM"), small_tokenizer)


def expected_logits(model, prompt, ids, mask):
    """After each token before one that was written: one pass over everything."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids]))[0]
    places = [len(prompt) + at - 1 for at, written in enumerate(mask) if written] + [len(prompt) + len(ids) - 1]
    return logits[places]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_many_at_their_own_points_equal_full_passes_over_each(scripted, engine, manager, batch_size):
    scripts = [
        [("search", "bridge"), ("search", "Marrow town"), "Tull"],
        ["Tull"],
        ["It says", ("search", "river Tull"), "that it is", ("search", "Marrow"), ("search", "bridge"), "old"],
        [("search", ""), "nothing"],
        [("search", "zzz"), "nothing", ("search", "old river"), "so"],
    ]
    for script in scripts:
        scripted.write(*script)
    searching = Searching(manager.search, top_k_per_hop=1)
    found = engine.generate_from_conversations([QUESTION] * 5, batch_size, searching=searching, max_tokens=99)
    prompt = render_prompt(QUESTION, engine.tokenizer)
    for seed, (script, (text, info)) in enumerate(zip(scripts, found, strict=True)):
        logits = torch.stack(scripted.logits[seed])
        torch.testing.assert_close(
            logits, expected_logits(engine.model, prompt, info.ids, info.mask), atol=1e-4, rtol=1e-4
        )
        assert [hop.query for hop in info.hops] == [part[1] for part in script if not isinstance(part, str)]
        assert text.split() == " ".join(part for part in script if isinstance(part, str)).split()
        assert info.finish_reason == "stop"
        # the conversation that results, rendered, is what was read and written
        whole = render({"messages": [*QUESTION["messages"], info.message]}, engine.tokenizer)
        assert whole.ids[:-1] == prompt + info.ids and whole.mask[len(prompt) : -1] == info.mask
    shown = [[document.id for document in hop.documents] for hop in found[0][1].hops]
    assert shown == [["bridge"], ["marrow"]] and found[3][1].hops[0].documents == []
    assert all(hop.search_seconds > 0 and hop.read_seconds > 0 for hop in found[0][1].hops)
    assert found[1][1].message == {"role": "assistant", "content": "Tull"}


def test_a_document_is_shown_once(scripted, engine, manager):
    conversation = {
        "messages": [
            {"role": "retrieval", "documents": [DOCUMENTS[0].to_dict()]},
            *QUESTION["messages"],
        ]
    }
    scripted.write(("search", "old bridge river"), ("search", "old bridge river"), "x")
    searching = Searching(manager.search, top_k_per_hop=1)
    _, info = engine.generate_from_conversation(conversation, searching=searching, max_tokens=99)
    assert [[d.id for d in hop.documents] for hop in info.hops] == [["tull"], ["marrow"]]
    text = engine.tokenizer.decode(info.ids)
    assert "Tull2" in text and "Marrow3" in text  # numbers go on from the document in the prompt


def test_limits(scripted, engine, manager):
    scripted.write(("search", "bridge"), ("search", "Marrow"), ("search", "Tull"), "x")
    stop = Searching(manager.search, max_hops=2, at_limit="stop")
    _, info = engine.generate_from_conversation(QUESTION, searching=stop, max_tokens=99)
    assert len(info.hops) == 2 and info.finish_reason == "hops"
    scripted.write("a", "b")
    none = Searching(manager.search, max_hops=0)
    engine.generate_from_conversation(QUESTION, searching=none, seed=1, max_tokens=99)
    start = engine.tokenizer.special_id("<|search_start|>")
    assert all(logits[start] == -torch.inf for logits in scripted.logits[1])  # it cannot even begin

    prompt = len(render_prompt(QUESTION, engine.tokenizer))
    seed = scripted.write(("search", "old bridge river"), "x")
    for room, count in ((10_000, 3), (prompt + 60, 1), (prompt + 1, 0)):
        scripted.logits[seed].clear()
        small = Searching(manager.search, max_context=room)
        _, info = engine.generate_from_conversation(QUESTION, searching=small, seed=seed, max_tokens=99)
        assert len(info.hops[0].documents) == count
        assert count == 0 or prompt + info.hops[0].end <= room

    seed = scripted.write(("search", "old bridge river"), "x")
    short = Searching(manager.search, max_doc_tokens=2, top_k_per_hop=2)
    _, info = engine.generate_from_conversation(QUESTION, searching=short, seed=seed, max_tokens=12)
    assert len(info.hops[0].documents) == 2 and info.hops[0].end - info.hops[0].start < 50


def test_so_many_searches_before_anything_else(engine, manager, small_tokenizer):
    start, end = (small_tokenizer.special_id(f"<|search_{edge}|>") for edge in ("start", "end"))
    request = Request([1], engine_module.Sampling(), small_tokenizer, Searching(manager.search, 1, 2, min_hops=1))
    assert request.required == start
    request.take(start, engine.end)
    assert request.required is None  # the search is written freely
    request.take(end, engine.end)
    assert len(request.hops) == 1 and request.required is None
    asked = [QUESTION, QUESTION]
    for settings in ({"min_hops": 0}, {"min_hops": 1}):
        searching = Searching(manager.search, 1, 2, **settings)
        for _, info in engine.generate_from_conversations(asked, searching=searching, max_tokens=6):
            assert (info.ids[0] == start) == bool(settings["min_hops"])


def test_a_threshold_decides_where_a_search_may_begin(small_tokenizer, manager, engine):
    start, end = (small_tokenizer.special_id(f"<|search_{edge}|>") for edge in ("start", "end"))
    logits = torch.zeros(small_tokenizer.vocab_size)
    logits[start] = 3.0
    likely = logits.softmax(0)[start].item()

    def left(request) -> str:
        steered = logits.clone()
        request.decide(steered)
        if torch.equal(steered, logits):
            return "free"
        return "search" if steered.isfinite().sum() == 1 else "write" if steered[start] == -torch.inf else "?"

    for threshold, first in ((None, "free"), (likely - 1e-4, "search"), (likely + 1e-4, "write"), (0, "search")):
        searching = Searching(manager.search, 1, 2, threshold=threshold)
        request = Request([1], engine_module.Sampling(), small_tokenizer, searching)
        assert left(request) == first
        request.take(start, engine.end)
        assert left(request) == "free"  # a search is written freely
        request.take(end, engine.end)
        request.show(manager.search(["bridge"], 1)[0])
        assert left(request) == first  # behind what was found, too
        request.take(5, engine.end)
        assert left(request) == "free"
    searching = Searching(manager.search, 1, 1, threshold=0.0)
    for _, info in engine.generate_from_conversations([QUESTION] * 2, searching=searching, max_tokens=6):
        assert info.ids[0] == start
    never = Searching(manager.search, 1, 0, threshold=0.0)  # no more than max_hops
    for _, info in engine.generate_from_conversations([QUESTION] * 2, searching=never, max_tokens=6):
        assert start not in info.ids


def test_a_threshold_decides_what_is_refused(small_tokenizer, manager, engine):
    refusal = small_tokenizer.encode(f" {ABSTENTION}")[0]
    logits = torch.zeros(small_tokenizer.vocab_size)
    logits[refusal] = 2.0
    likely = logits.softmax(0)[refusal].item()
    for threshold, allowed in ((likely - 1e-4, "refusal"), (likely + 1e-4, "others"), (None, "all")):
        request = Request([1], engine_module.Sampling(refusal_threshold=threshold), small_tokenizer)
        steered = logits.clone()
        request.decide(steered)
        finite = steered.isfinite()
        assert finite[refusal] == (allowed != "others") and finite.sum() == {"refusal": 1, "all": len(logits)}.get(
            allowed, len(logits) - 1
        )
        request.take(5, engine.end)
        steered = logits.clone()
        request.decide(steered)
        assert torch.equal(steered, logits)  # only the first token
    for _, info in engine.generate_from_conversations([QUESTION] * 2, refusal_threshold=0.0, max_tokens=3):
        assert info.ids[0] == refusal
    for _, info in engine.generate_from_conversations([QUESTION] * 2, refusal_threshold=1.0, max_tokens=3):
        assert info.ids[0] != refusal
    searching = Searching(manager.search, 1, 1, threshold=0.0)  # a search that is due comes first
    for _, info in engine.generate_from_conversations(
        [QUESTION], searching=searching, refusal_threshold=0.0, max_tokens=4
    ):
        assert info.ids[0] == small_tokenizer.special_id("<|search_start|>")
    with pytest.raises(UserError, match="refusal_threshold"):
        engine_module.Sampling(refusal_threshold=1.5)


def test_max_tokens_counts_what_is_written(scripted, engine, manager):
    seed = scripted.write(("search", "bridge"), "a b c d e f g h")
    searching = Searching(manager.search)
    _, info = engine.generate_from_conversation(QUESTION, searching=searching, seed=seed, max_tokens=12)
    assert info.finish_reason == "length" and len(scripted.logits[seed]) == 12 and len(info.ids) > 40


def test_a_search_that_is_cut_off_is_none(scripted, engine, manager):
    seed = scripted.write(("search", "old bridge"), "x")
    searching = Searching(manager.search)
    text, info = engine.generate_from_conversation(QUESTION, searching=searching, seed=seed, max_tokens=2)
    assert info.hops == [] and text == "" and info.finish_reason == "length"


def test_without_searching_the_markers_are_tokens_like_others(scripted, engine):
    seed = scripted.write(("search", "bridge"), "x")
    _, info = engine.generate_from_conversation(QUESTION, seed=seed, max_tokens=99)
    assert info.hops == [] and info.ids == scripted.scripts[seed][:-1]


def test_one_search_for_all_that_wait(scripted, engine):
    asked = []

    def search(queries, top_k):
        asked.append((len(queries), top_k))
        return [[DOCUMENTS[0]] for _ in queries]

    for _ in range(7):
        scripted.write(("search", "bridge"), ("search", "Marrow"), "x")
    questions = [{"messages": [{"role": "user", "content": f"{n}?"}]} for n in (1, 2, 3, 4, 5, 6, 6)]
    found = engine.generate_from_conversations(
        questions, 7, searching=Searching(search, top_k_per_hop=2), max_tokens=99
    )
    assert asked == [(6, 2), (6, 3)]  # one more than wanted, as one may have been shown; for the last two the same one
    first, second = found[-2][1], found[-1][1]
    assert first.ids == second.ids and first.hops == second.hops and first.hops is not second.hops


def test_what_was_read_is_reused_after_searches_too(make_model, small_tokenizer, scripted, manager):
    engine = Engine(make_model(small_tokenizer.vocab_size, pattern="MT"), small_tokenizer, prefix_bytes=1 << 24)
    seed = scripted.write(("search", "bridge"), "Tull")
    _, info = engine.generate_from_conversation(QUESTION, searching=Searching(manager.search), seed=seed, max_tokens=99)
    follow = [*QUESTION["messages"], info.message, {"role": "user", "content": "And?"}]
    seed = scripted.write("yes")
    _, second = engine.generate_from_conversation({"messages": follow}, seed=seed, max_tokens=99)
    assert second.reused_tokens == info.prompt_tokens + len(info.ids)
    prompt = render_prompt({"messages": follow}, small_tokenizer)
    expected = expected_logits(engine.model, prompt, second.ids, [1] * len(second.ids))
    torch.testing.assert_close(torch.stack(scripted.logits[seed]), expected, atol=1e-4, rtol=1e-4)


def test_bad_settings(manager, small_tokenizer):
    for wrong in ({"top_k_per_hop": 0}, {"max_hops": -1}, {"max_doc_tokens": 0}, {"min_hops": 5}, {"threshold": 1.1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Searching(manager.search, **wrong)
    with pytest.raises(UserError, match="empty"):
        Request([], None, small_tokenizer)
