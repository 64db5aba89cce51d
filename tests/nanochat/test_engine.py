"""The engine against the obvious way to generate: one whole forward pass for every token."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import UserError
from nanochat.conversation import answer_ids, answer_text, render_prompt
from nanochat.engine import Batch, Engine, Request
from nanochat.model.cache import Cache
from nanochat.sampling import Sampling

PATTERNS = ["MT", "TT", "MM"]


@pytest.fixture
def engine(small_tokenizer, make_model):
    return Engine(make_model(small_tokenizer.vocab_size, "MT"), small_tokenizer)


def naive(model, prompt, max_tokens, end=None):
    """Greedy decoding without cache or batch."""
    ids = list(prompt)
    for _ in range(max_tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def prompts_of(lengths, vocab_size):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_batch_equals_rows_alone_and_naive_decoding(pattern, small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, pattern).eval()
    engine = Engine(model, small_tokenizer)
    prompts = prompts_of([70, 3, 1, 12], small_tokenizer.vocab_size)
    expected = [naive(model, p, 15, engine.end) for p in prompts]
    assert len({tuple(e) for e in expected}) > 1
    assert engine.generate_batch(prompts, max_tokens=15) == expected
    assert engine.generate_batch(prompts, max_tokens=15, batch_size=2) == expected
    assert [list(engine.generate(p, max_tokens=15)) for p in prompts] == expected


def test_ended_rows_leave_the_batch_and_do_not_disturb_the_others(engine, monkeypatch):
    """The token a row writes sixth is made its end: rows end at different steps, what they wrote is what they write."""
    prompts = prompts_of([9, 4, 20, 6, 13], engine.tokenizer.vocab_size)
    free = [naive(engine.model, p, 12) for p in prompts]
    engine.end = free[2][5]
    expected = [ids[: ids.index(engine.end)] if engine.end in ids else ids for ids in free]
    assert len({len(e) for e in expected}) > 1
    sizes = []
    forward = engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda tokens, **kw: sizes.append(len(tokens)) or forward(tokens, **kw)
    )
    assert engine.generate_batch(prompts, max_tokens=12) == expected
    # before each step the batch holds the rows that have not written their end yet
    steps = min(12, max(map(len, expected)) + 1)
    assert sizes == [sum(len(e) >= step for e in expected) for step in range(steps)]


def test_max_tokens(engine, monkeypatch):
    (prompt,) = prompts_of([5], engine.tokenizer.vocab_size)
    forward, calls = engine.model.forward, []
    monkeypatch.setattr(engine.model, "forward", lambda *a, **kw: calls.append(1) or forward(*a, **kw))
    for n in (1, 4):
        calls.clear()
        assert list(engine.generate(prompt, max_tokens=n)) == naive(engine.model, prompt, n)
        assert len(calls) == n + n  # the naive loop's and ours: no pass for a token nobody asked for
    assert engine.generate_batch([], max_tokens=4) == []
    with pytest.raises(UserError, match="prompt is empty"):
        list(engine.generate([], max_tokens=4))


def test_a_seed_gives_the_same_text_again_and_another_seed_another(engine):
    (prompt,) = prompts_of([5], engine.tokenizer.vocab_size)

    def run(seed, **kw):
        return list(engine.generate(prompt, max_tokens=20, temperature=1.0, seed=seed, **kw))

    torch.manual_seed(7)
    first = run(3)
    torch.manual_seed(8)  # the global generator has no say
    assert run(3) == first != run(4)
    assert run(3, top_k=1) == naive(engine.model, prompt, 20, engine.end)


TEXTS = ["plain", "naïve Fluß", "東京タワー", "🙂👩‍👩‍👧 ok", "é", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_decoded_text(engine, text):
    tokenizer = engine.tokenizer
    as_bytes = [tokenizer.token_bytes.index(bytes([b])) for b in text.encode()]  # every character cut up
    for ids in (tokenizer.encode(text), as_bytes):
        pieces = list(engine.stream_text(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert all(pieces)
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    if text:  # as soon as possible: the first character comes with its last byte, not later
        needed = len(text[0].encode())
        assert next(engine.stream_text(iter(as_bytes[:needed]))) == text[0]


def test_streamed_bytes_that_are_no_text_equal_decoded_ones(engine):
    byte_ids = [engine.tokenizer.token_bytes.index(bytes([b])) for b in range(256)]
    generator = torch.Generator().manual_seed(0)
    for length in [1, 2, 3, 5, 8] * 60:
        # lead and continuation bytes mostly, so that characters begin, break off and end
        choices = torch.tensor([0x41, 0xC3, 0xE4, 0xF0, 0x9F, 0x80, 0xBF, 0xFF])
        data = choices[torch.randint(0, 8, (length,), generator=generator)].tolist()
        ids = [byte_ids[b] for b in data]
        assert "".join(engine.stream_text(ids)) == engine.tokenizer.decode(ids)


def test_answer_ids_stream_what_answer_text_says(engine):
    t = engine.tokenizer
    marker = t.special_id
    ids = [
        *t.encode(" The bridge"),
        marker("<|search_start|>"), *t.encode("query"), marker("<|search_end|>"),
        marker("<|retrieval_start|>"), marker("<|doc_start|>"), *t.encode("found"), marker("<|retrieval_end|>"),
        marker("<|bos|>"), *t.encode(" is old "),
        marker("<|assistant_end|>"), *t.encode("beyond"),
    ]  # fmt: skip
    assert "".join(engine.stream_text(answer_ids(iter(ids), t))) == " The bridge is old "
    assert answer_text(ids, t) == "The bridge is old"


def test_generate_from_conversation(engine):
    conversation = {
        "messages": [
            {"role": "retrieval", "documents": [{"id": "1", "title": "Bridge", "content": "Built in 1987. " * 30}]},
            {"role": "user", "content": "When was the bridge built?"},
        ]
    }
    prompt = render_prompt(conversation, engine.tokenizer)
    engine.end = -1  # nothing ends it
    expected = naive(engine.model, prompt, 10)
    text, info = engine.generate_from_conversation(conversation, max_tokens=10)
    assert text == answer_text(expected, engine.tokenizer)
    assert (info.ids, info.prompt_tokens, info.finish_reason) == (expected, len(prompt), "length")
    assert 0 < info.first_token_seconds <= info.seconds

    engine.end = expected[4]
    stopped = expected[: expected.index(engine.end)]
    _, info = engine.generate_from_conversation(conversation, max_tokens=10)
    assert (info.ids, info.finish_reason) == (stopped, "stop")

    _, info = engine.generate_from_conversation(conversation, max_tokens=1, max_prompt_tokens=60)
    assert info.prompt_tokens == len(render_prompt(conversation, engine.tokenizer, 60)) <= 60
    _, info = engine.generate_from_conversation(conversation, max_tokens=1, max_doc_tokens=7)
    assert info.prompt_tokens == len(render_prompt(conversation, engine.tokenizer, None, 7))
    with pytest.raises(UserError, match="question takes"):
        engine.generate_from_conversation(conversation, max_prompt_tokens=10)


def test_generating_leaves_no_graph_and_no_training_mode(engine):
    engine.model.train()
    (prompt,) = prompts_of([4], engine.tokenizer.vocab_size)
    list(engine.generate(prompt, max_tokens=2))
    assert not engine.model.training
    out = engine.model(torch.tensor([prompt]), torch.tensor([prompt]))
    out.backward()  # nothing of the inference run is left in the model
    assert isinstance(engine.model.embed.weight.grad, torch.Tensor)


def test_engine_needs_only_a_model_and_a_tokenizer(small_tokenizer):
    """A model of one line, so that what the engine itself does can be seen: it writes the number of tokens so far."""

    class Counting(torch.nn.Module):
        device = torch.device("cpu")

        def new_cache(self, batch_size):
            return Cache("", batch_size)

        def forward(self, tokens, cache, valid=None, last_only=True):
            cache.advance(tokens.shape[1], valid)
            return torch.nn.functional.one_hot(cache.lengths, small_tokenizer.vocab_size).float()

    engine = Engine(Counting(), small_tokenizer)
    engine.end = 7
    assert engine.generate_batch([[1], [1] * 5, [1] * 7, [1] * 9], max_tokens=5) == [
        [1, 2, 3, 4, 5],
        [5, 6],
        [],
        [9, 10, 11, 12, 13],
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_pieces_equals_whole_prefill(pattern, chunk, small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, pattern).eval()
    prompts = prompts_of([70, 3, 1, 12, 64], small_tokenizer.vocab_size)
    requests = [Request(p, Sampling(), small_tokenizer) for p in prompts]
    parts = Engine(model, small_tokenizer, prefill_chunk=chunk).prefill(requests)
    assert torch.cat([cache.lengths for cache, _ in parts]).tolist() == [70, 3, 1, 12, 64]
    logits = torch.cat([logits for _, logits in parts])
    for row, prompt in zip(logits, prompts, strict=True):
        assert (row - model(torch.tensor([prompt]))[0, -1]).abs().max() < 1e-4
    pieces = Engine(model, small_tokenizer, prefill_chunk=chunk).generate_batch(prompts, max_tokens=9)
    assert pieces == [naive(model, p, 9, small_tokenizer.special_id("<|assistant_end|>")) for p in prompts]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("join_at", [1, 2])
def test_rows_that_join_while_others_run(pattern, join_at, small_tokenizer, make_model):
    model = make_model(small_tokenizer.vocab_size, pattern).eval()
    engine = Engine(model, small_tokenizer)
    prompts = prompts_of([30, 4, 70, 6, 13, 90], small_tokenizer.vocab_size)
    sizes = [5, 12, 3, 9, 1, 7]
    batch = Batch(engine, max_rows=3, join_at=join_at)
    requests = [Request(p, Sampling(max_tokens=n), small_tokenizer) for p, n in zip(prompts, sizes, strict=True)]
    for request in requests[:2]:
        batch.add(request)
    batch.step()
    for request in requests[2:]:
        batch.add(request)
    most, steps = 0, 1
    while rows := batch.step():
        most, steps = max(most, len(rows)), steps + 1
    assert most == 3 and steps < sum(sizes)
    assert [r.ids for r in requests] == [naive(model, p, n, engine.end) for p, n in zip(prompts, sizes, strict=True)]


def test_a_dropped_row_leaves_the_others_alone(engine):
    prompts = prompts_of([9, 4, 20], engine.tokenizer.vocab_size)
    batch = Batch(engine, max_rows=2)
    first, second, waiting = (batch.add(Request(p, Sampling(max_tokens=8), engine.tokenizer)) for p in prompts)
    batch.step()
    batch.drop(first)
    batch.drop(waiting)
    while batch.step():
        pass
    assert len(first.ids) == 1 and not waiting.ids
    assert second.ids == naive(engine.model, prompts[1], 8, engine.end)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_read_once_until_they_differ(pattern, small_tokenizer, make_model, monkeypatch):
    """The same tokens as each alone, of far fewer read."""
    model = make_model(small_tokenizer.vocab_size, pattern, noise=0.2).eval()
    engine = Engine(model, small_tokenizer)
    prompts = prompts_of([30, 30, 7], small_tokenizer.vocab_size)
    read = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **kw: read.append(tokens.numel()) or forward(tokens, **kw))

    def requests():
        for at, prompt in enumerate(prompts):
            for copy, size in enumerate((9, 9, 9, 4)):  # the last ends earlier, so it stands alone
                sampling = Sampling(max_tokens=size, temperature=0.05, seed=10 * at + copy)
                yield Request(prompt, sampling, small_tokenizer)

    alone = list(requests())
    for request in alone:
        engine.run([request])
    told_apart, read[:] = sum(read), []
    together = list(requests())
    engine.run(together, 16)
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({tuple(r.ids) for r in together[:3]}) > 1  # they part somewhere
    assert sum(read) < 0.8 * told_apart
    read[:] = []
    greedy = [Request(prompts[0], Sampling(max_tokens=5), small_tokenizer) for _ in range(4)]
    engine.run(greedy, 3)  # no more than three on their way at a time
    assert read == [30, 1, 1, 1, 1] * 2


def test_one_of_several_that_are_read_together_may_be_dropped(engine):
    prompt = prompts_of([9], engine.tokenizer.vocab_size)[0]
    batch = Batch(engine)
    requests = [batch.add(Request(prompt, Sampling(max_tokens=6), engine.tokenizer)) for _ in range(3)]
    batch.step()
    batch.drop(requests[0])
    batch.step()
    batch.drop(requests[2])
    while batch.step():
        pass
    assert [len(r.ids) for r in requests] == [1, 6, 2]
    assert requests[1].ids == naive(engine.model, prompt, 6, engine.end)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_follow_up_reads_only_what_is_new(pattern, small_tokenizer, make_model, monkeypatch):
    model = make_model(small_tokenizer.vocab_size, pattern).eval()
    engine = Engine(model, small_tokenizer, prefix_bytes=1 << 20)
    plain = Engine(model, small_tokenizer)
    read = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **kw: read.append(tokens.numel()) or forward(tokens, **kw))

    def ask(engine, messages):
        read.clear()
        text, info = engine.generate_from_conversation({"messages": messages}, max_tokens=6)
        return text, info

    documents = [{"id": str(n), "title": f"Town {n}", "content": "It has a bridge. " * 9} for n in range(3)]
    talk = [{"role": "retrieval", "documents": documents}]
    first = [*talk, {"role": "user", "content": "Which river?"}]
    other = [*talk, {"role": "user", "content": "When was it built, and by whom?"}]
    for messages in (first, other):
        expected, _ = ask(plain, messages)
        whole = sum(read)
        text, info = ask(engine, messages)
        assert text == expected
        if messages is other:  # the documents were read for the first question
            assert info.reused_tokens > 0.7 * info.prompt_tokens and sum(read) < 0.4 * whole
    # the second turn of a talk goes on from the end of the first answer, if it reads back as the tokens written
    text, info = ask(engine, first)
    again = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    expected, _ = ask(plain, again)
    text, info = ask(engine, again)
    assert text == expected and info.reused_tokens > 0.7 * info.prompt_tokens


def test_states_kept_stay_within_their_memory(engine):
    bounded = Engine(engine.model, engine.tokenizer, prefix_bytes=40_000)
    prompts = prompts_of([50, 60, 70, 80, 90, 40], engine.tokenizer.vocab_size)
    for prompt in prompts:
        list(bounded.generate(prompt, max_tokens=3))
        assert bounded.prefixes.nbytes <= 40_000
    assert 0 < len(bounded.prefixes.states) < len(prompts)
    kept = max(bounded.prefixes.states, key=len)
    assert list(bounded.generate([*kept, 5], max_tokens=6)) == list(engine.generate([*kept, 5], max_tokens=6))


def test_an_answer_ends_before_a_stop_text(engine, monkeypatch):
    tokenizer = engine.tokenizer
    said = tokenizer.encode(" The old bridge over the river was built")
    written = iter(said)
    monkeypatch.setattr("nanochat.engine.sample", lambda *a: torch.tensor([next(written)]))
    conversation = {"messages": [{"role": "user", "content": "What?"}]}
    text, info = engine.generate_from_conversation(conversation, max_tokens=50, stop=(" river", "over"))
    assert text == "The old bridge" and info.finish_reason == "stop"
    assert tokenizer.decode(info.ids).endswith("over")
