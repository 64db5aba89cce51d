"""Words, the arrays of the inverted index, and the sums over them."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.retrieval import blocks, postings, scoring
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.helper import Helper
from nanochat.retrieval.postings import Postings, hash64
from tests.nanochat.retrieval.samples import random_documents


@pytest.mark.parametrize("block", [blocks.BLOCK, 7])
def test_index_arrays_after_changes_are_those_of_a_fresh_build(block, monkeypatch, tmp_path):
    """With small blocks, parts that are merged begin in the middle of one."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(postings, "MERGED_AT_ONCE", 100)
    analyzer = Analyzer()
    texts = [document.content for document in random_documents(90)]
    mask = np.arange(90) % 3 > 0
    fresh = Postings.build([text for text, kept in zip(texts, mask, strict=True) if kept], analyzer)
    changed = Postings.merge([Postings.build(texts[:40], analyzer), Postings.build(texts[40:], analyzer)]).keep(mask)
    monkeypatch.setattr(postings, "TEXT_AT_ONCE", 300)
    kept_texts = [text for text, kept in zip(texts, mask, strict=True) if kept]
    in_blocks = Postings.build(kept_texts, analyzer)
    others = [changed, in_blocks]
    if block == 1 << 16:  # the helper is another process, in which blocks are what they are
        others.append(Postings.build(kept_texts, analyzer, tmp_path))
        assert list(tmp_path.glob("block-*"))
    fresh.save(tmp_path)
    for other in (*others, Postings.load(tmp_path)):
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


@pytest.mark.parametrize("block", [blocks.BLOCK, 8])
def test_postings_are_what_counting_finds(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    analyzer = Analyzer()
    documents = random_documents(50)
    built = Postings.build([document.content for document in documents], analyzer)
    counts = [Counter(analyzer.terms(document.content)) for document in documents]
    assert len(built.hashes) == len({term for of_document in counts for term in of_document})
    assert built.lengths.tolist() == [sum(of_document.values()) for of_document in counts]
    for term in {term for of_document in counts for term in of_document}:
        t = int(built.find(np.array([hash64(term)], dtype=np.uint64))[0])
        span = slice(built.starts[t], built.starts[t + 1])
        rows = built.rows(slice(t, t + 1))
        found = dict(zip(rows.tolist(), built.counts(span).tolist(), strict=True))
        assert (built.pairs[built.codes[span], 1] == built.lengths[rows]).all()
        assert found == {row: of_document[term] for row, of_document in enumerate(counts) if of_document[term]}
        assert built.most[t] == max(found.values())
        for column, such in enumerate((lambda f: f == 1, lambda f: f == 2, lambda f: f > 2)):
            lengths = [built.lengths[row] for row, f in found.items() if such(f)]
            assert built.shortest[t, column] == min(lengths, default=np.iinfo(np.int32).max)
    assert built.find(np.array([hash64("nobody")], dtype=np.uint64)) == [-1]
    assert built.docs.max() < block
    if block == 8:
        assert built.run_starts[-1] == len(built.runs) > len(built.hashes)
        assert (built.runs[:, 1] + 1).sum() == len(built.docs)
    else:
        assert not len(built.runs)


def test_postings_of_more_documents_than_16_bits_count():
    """Blocks of the size that they have."""
    texts = ["baun"] * 70_000
    for row, text in {0: "caun", 65_535: "caun dyun", 65_536: "baun caun", 69_999: "dyun"}.items():
        texts[row] = text
    fresh = Postings.build(texts, Analyzer())
    merged = Postings.merge([Postings.build(texts[:60_000], Analyzer()), Postings.build(texts[60_000:], Analyzer())])
    expected = {
        "baun": [*range(1, 65_535), *range(65_536, 69_999)],
        "caun": [0, 65_535, 65_536],
        "dyun": [65_535, 69_999],
    }
    for built in (fresh, merged):
        assert built.docs.dtype == np.uint16
        for term, rows in expected.items():
            t = int(built.find(np.array([hash64(term)], dtype=np.uint64))[0])
            assert built.rows(slice(t, t + 1)).tolist() == rows
    kept = merged.keep(np.arange(70_000) >= 65_535)
    assert not len(kept.runs) and kept.rows(slice(0, len(kept.hashes))).max() == 69_999 - 65_535


def test_files_that_do_not_fit_together_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    built = Postings.build([document.content for document in random_documents(50)], Analyzer())
    for name, wrong in (("runs", built.runs[1:]), ("run_starts", built.run_starts[1:]), ("docs", built.docs[1:])):
        built.save(tmp_path)
        np.save(tmp_path / f"{name}.npy", wrong)
        with pytest.raises(ValueError, match="do not fit together"):
            Postings.load(tmp_path)


def every_sum(segment, docs, codes, weights, k):
    """The same as scoring.best, by adding up everything."""
    scores = np.zeros(len(segment.id_rank))
    for of_term, weight, of_posting in zip(docs, weights, codes, strict=True):
        scores[of_term] += weight * segment.weights(of_posting, of_term)
    if len(segment.allowed):
        scores[~segment.allowed] = 0
    order = np.lexsort((segment.id_rank, -scores))[:k]
    order = order[scores[order] > 0]
    return order, scores[order]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("simple", [False, True])
def test_pruned_search_equals_adding_up_everything(compiled, simple, monkeypatch):
    """Bit for bit, with many ties, few and many results, filters, bounds that are tight and bounds that are not known,
    one block and many, terms that the segment does not have; and the room is zero again afterwards."""
    if compiled:
        pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    pruned = 0
    for trial in range(400):
        monkeypatch.setattr(scoring, "_SHORT", (0, 50, 10**6)[trial % 7 % 3])
        N = int(rng.integers(1, 400)) * (500 if trial % 11 == 0 else 1)
        monkeypatch.setattr(blocks, "BLOCK", (1 << 16, 64, N // 9 + 1)[trial % 5 % 3])
        sizes = np.minimum(N, rng.geometric(1 / rng.integers(2, N // 2 + 3, size=rng.integers(0, 6))))
        sizes.sort()
        docs = [np.sort(rng.choice(N, size, replace=False)).astype(np.int32) for size in sizes]
        codes = [rng.integers(12, size=size).astype(np.uint8) for size in sizes]
        starts = np.cumsum([0, *sizes])
        rows = np.concatenate([np.zeros(0, np.int32), *docs], dtype=np.int32)
        in_blocks, run_starts, runs = blocks.divide(rows, starts, N)
        run_starts = run_starts if len(runs) else np.zeros(len(starts), dtype=np.int64)
        spans = np.stack([starts[:-1], starts[1:], run_starts[:-1], run_starts[1:]], axis=1)
        if trial % 4 == 1 and docs:
            there = rng.integers(len(docs) + 1)
            docs.insert(there, docs[0][:0])
            codes.insert(there, codes[0][:0])
            spans = np.insert(spans, there, [0, 0, 0, 0], axis=0)
        segment = scoring.Segment(
            in_blocks,
            runs,
            np.concatenate([np.zeros(0, np.uint8), *codes], dtype=np.uint8),
            rng.integers(1, 5, 12) / 4,
            rng.integers(1, 4, N).astype(np.float64) if simple else np.zeros(0),
            rng.permutation(N).astype(np.int32),
            rng.random(N) < 0.5 if trial % 3 == 0 else np.zeros(0, dtype=bool),
        )
        weights = np.sort(rng.integers(1, 9, len(docs)))[::-1].astype(np.float64)
        bounds = np.array(
            [weight * segment.weights(c, d).max(initial=0) for weight, c, d in zip(weights, codes, docs, strict=True)]
        )
        if trial % 5 == 0:
            bounds[:] = np.inf
        room, k = scoring.Room(N, compiled), int(rng.integers(1, 30))
        rows, scores = scoring.best(segment, room, spans, weights, bounds, k, compiled)
        expected = every_sum(segment, docs, codes, weights, k)
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
