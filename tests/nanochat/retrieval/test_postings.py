"""Words, the arrays of the inverted index, and the sums over them."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import postings, scoring
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.helper import Helper
from nanochat.retrieval.postings import Postings, hash64
from tests.nanochat.retrieval.samples import random_documents


def test_index_arrays_after_changes_are_those_of_a_fresh_build(monkeypatch, tmp_path):
    analyzer = Analyzer()
    texts = [document.content for document in random_documents(90)]
    mask = np.arange(90) % 3 > 0
    fresh = Postings.build([text for text, kept in zip(texts, mask, strict=True) if kept], analyzer)
    changed = Postings.merge([Postings.build(texts[:40], analyzer), Postings.build(texts[40:], analyzer)]).keep(mask)
    monkeypatch.setattr(postings, "BLOCK", 300)
    kept_texts = [text for text, kept in zip(texts, mask, strict=True) if kept]
    in_blocks = Postings.build(kept_texts, analyzer)
    with_help = Postings.build(kept_texts, analyzer, tmp_path)
    assert list(tmp_path.glob("block-*"))
    for other in (changed, in_blocks, with_help):
        for field in fields(Postings):
            np.testing.assert_array_equal(getattr(other, field.name), getattr(fresh, field.name))
            assert getattr(other, field.name).dtype == getattr(fresh, field.name).dtype


def test_a_helper_that_dies_is_told(tmp_path):
    helper = Helper(Analyzer(), tmp_path)
    try:
        assert helper.build(["baun caun"]).result().lengths.tolist() == [2]
        helper.process.kill()
        helper.process.wait()
        with pytest.raises(UserError, match="second process of the build has ended"):
            helper.build(["baun"]).result()
    finally:
        helper.close()


def test_postings_are_what_counting_finds():
    analyzer = Analyzer()
    documents = random_documents(50)
    built = Postings.build([document.content for document in documents], analyzer)
    counts = [Counter(analyzer.terms(document.content)) for document in documents]
    assert len(built.hashes) == len({term for of_document in counts for term in of_document})
    assert built.lengths.tolist() == [sum(of_document.values()) for of_document in counts]
    for term in {term for of_document in counts for term in of_document}:
        t = int(built.find(np.array([hash64(term)], dtype=np.uint64))[0])
        span = slice(built.starts[t], built.starts[t + 1])
        found = dict(zip(built.docs[span].tolist(), built.counts(span).tolist(), strict=True))
        assert (built.pairs[built.codes[span], 1] == built.lengths[built.docs[span]]).all()
        assert found == {row: of_document[term] for row, of_document in enumerate(counts) if of_document[term]}
        assert built.most[t] == max(found.values())
        for column, such in enumerate((lambda f: f == 1, lambda f: f == 2, lambda f: f > 2)):
            lengths = [built.lengths[row] for row, f in found.items() if such(f)]
            assert built.shortest[t, column] == min(lengths, default=np.iinfo(np.int32).max)
    assert built.find(np.array([hash64("nobody")], dtype=np.uint64)) == [-1]


def every_sum(segment, starts, ends, weights, k):
    """The same as scoring.best, by adding up everything."""
    scores = np.zeros(len(segment.id_rank))
    for start, end, weight in zip(starts, ends, weights, strict=True):
        docs, codes = segment.docs[start:end], segment.codes[start:end]
        scores[docs] += weight * segment.weights(codes, docs)
    if len(segment.allowed):
        scores[~segment.allowed] = 0
    order = np.lexsort((segment.id_rank, -scores))[:k]
    order = order[scores[order] > 0]
    return order, scores[order]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("simple", [False, True])
def test_pruned_search_equals_adding_up_everything(compiled, simple, monkeypatch):
    """Bit for bit, with many ties, few and many results, filters, bounds that are tight and bounds that are not known;
    and the room is zero again afterwards."""
    if compiled:
        pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    pruned = 0
    for trial in range(400):
        monkeypatch.setattr(scoring, "_SHORT", (0, 50, 10**6)[trial % 7 % 3])
        N = int(rng.integers(1, 400)) * (500 if trial % 11 == 0 else 1)
        sizes = np.minimum(N, rng.geometric(1 / rng.integers(2, N // 2 + 3, size=rng.integers(0, 6))))
        sizes.sort()
        docs = [np.sort(rng.choice(N, size, replace=False)).astype(np.int32) for size in sizes]
        codes = [rng.integers(12, size=size).astype(np.uint8) for size in sizes]
        ends = np.cumsum(sizes).astype(np.int64)
        starts = ends - sizes
        segment = scoring.Segment(
            np.concatenate([np.zeros(0, np.int32), *docs], dtype=np.int32),
            np.concatenate([np.zeros(0, np.uint8), *codes], dtype=np.uint8),
            rng.integers(1, 5, 12) / 4,
            rng.integers(1, 4, N).astype(np.float64) if simple else np.zeros(0),
            rng.permutation(N).astype(np.int32),
            rng.random(N) < 0.5 if trial % 3 == 0 else np.zeros(0, dtype=bool),
        )
        weights = np.sort(rng.integers(1, 9, len(sizes)))[::-1].astype(np.float64)
        bounds = np.array(
            [weight * segment.weights(c, d).max(initial=0) for weight, c, d in zip(weights, codes, docs, strict=True)]
        )
        if trial % 5 == 0:
            bounds[:] = np.inf
        room, k = scoring.Room(N, compiled), int(rng.integers(1, 30))
        rows, scores = scoring.best(segment, room, starts, ends, weights, bounds, k, compiled)
        expected = every_sum(segment, starts, ends, weights, k)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(scores, expected[1])
        assert not room.sums.any()
        pruned += len(rows) == k and len(sizes) > 1
    assert pruned > 30


def test_words_are_cut_to_stems_and_function_words_left_out():
    terms = Analyzer().terms("The runners were running; it's O'Brien's 2nd RUN.")
    assert terms == ["runner", "run", "o", "brien", "2nd", "run"]
    assert Analyzer(stem=False, stop_words=False).terms("The Runs") == ["the", "runs"]
    assert Analyzer(language="german").terms("die Häuser") == ["die", "haus"]


def test_whole_texts_give_the_same_terms_one_by_one_and_together():
    analyzer = Analyzer()
    texts = ["The cats sat", "", "of the", "a cat's CATS; café"]
    word_ids = analyzer.word_ids()
    ids, lengths = word_ids.of_texts(texts)
    assert lengths.tolist() == [len(analyzer.terms(text)) for text in texts]
    assert [word_ids.terms[id] for id in ids] == [term for text in texts for term in analyzer.terms(text)]


def test_ascii_words_are_those_of_any_text():
    text = "".join(map(chr, range(1, 128))) + " a_b c-d 3.14 x'y"
    analyzer = Analyzer()
    assert analyzer.words(text) == [word for word in analyzer.words(text + " é") if word != "e"]
