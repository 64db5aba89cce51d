"""What an index is trained on: pieces and words of the right documents, in the right shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.dsi.queries import PREFIX_WORDS, PseudoQueries, parse_kinds
from nanochat.dsi.training import PseudoQueryBatches
from nanochat.retrieval.document import Document


def document(id: str, content: str) -> Document:
    return Document(id=id, title="", content=content)


LONG = [document(str(d), " ".join(f"d{d}w{n}" for n in range(60))) for d in range(5)]


def draws(queries: PseudoQueries, document: int, count: int) -> list[list[str]]:
    rng = np.random.default_rng(0)
    return [queries.draw(document, rng).split() for _ in range(count)]


def test_prefixes_and_spans_are_pieces_of_the_document():
    words = LONG[1].content.split()
    assert draws(PseudoQueries(LONG, {"prefix": 1}), 1, 3) == [words[:PREFIX_WORDS]] * 3
    spans = draws(PseudoQueries(LONG, {"spans": 1}, noise=0), 1, 300)
    starts = [words.index(span[0]) for span in spans]
    assert all(words[at : at + len(span)] == span for at, span in zip(starts, spans, strict=True))
    assert {len(span) for span in spans} == set(range(6, 24)) and min(starts) == 0 and max(starts) > 50


def test_keywords_are_in_order_and_as_likely_as_they_are_rare():
    texts = ["the common rare", "the common", "the common", "the"]
    queries = PseudoQueries([document(str(n), text) for n, text in enumerate(texts)], {"keywords": 1}, noise=0)
    assert queries.draw(0, np.random.default_rng(0)) == "common rare"  # both that are no stop words, in their order
    assert queries.draw(3, np.random.default_rng(0)) == "the"  # it has no other
    idf = {"common": np.log(5 / 3), "rare": np.log(5 / 1)}
    assert queries._weights[0] == pytest.approx([0, *np.array([*idf.values()]) / sum(idf.values())])
    many = PseudoQueries(LONG, {"keywords": 1}, noise=0)
    found = draws(many, 2, 500)
    words = LONG[2].content.split()
    assert {len(one) for one in found} == set(range(2, 12))
    assert all([words.index(word) for word in one] == sorted(map(words.index, one)) for one in found)
    counts = Counter(word for one in found for word in one)
    assert len(counts) == 60 and max(counts.values()) < 3 * min(counts.values())  # all as rare as each other


def test_titles_are_whole_and_keywords_stand_before_or_behind():
    content = [f"w{n}" for n in range(30)]
    named = [Document(id="0", title="New York City", content=" ".join(content)), document("1", "city of dreams")]
    queries = PseudoQueries(named, {"titles": 1}, noise=0)
    places, lengths = Counter(), Counter()
    for words in draws(queries, 0, 1000):
        at = words.index("New")
        others = words[:at] + words[at + 3 :]
        assert words[at : at + 3] == ["New", "York", "City"] and at in (0, len(others))
        assert [content.index(word) for word in others] == sorted(map(content.index, others))
        places[at > 0] += bool(others)
        lengths[len(others)] += 1
    assert set(lengths) == set(range(4)) and places[True] == pytest.approx(places[False], rel=0.2)
    assert {word for words in draws(queries, 1, 50) for word in words} == {"city", "dreams"}  # it has no title
    short = PseudoQueries([Document(id="0", title="The Who", content="")], {"titles": 1}, noise=0)
    assert draws(short, 0, 1) == [["The", "Who"]]


@pytest.mark.parametrize("kind", ["keywords", "titles", "spans"])
def test_noise_comes_from_all_documents_among_the_words(kind):
    own = set(LONG[0].content.split())
    found = draws(PseudoQueries(LONG, {kind: 1}, noise=8), 0, 2000)
    strange = [sum(word not in own for word in one) for one in found]
    # 7 of 10 have 0 to 8 words, of which four documents of five are others
    assert np.mean(strange) == pytest.approx(0.7 * 4 * 0.8, rel=0.1) and max(strange) > 5
    places = [at / (len(one) - 1) for one in found for at, word in enumerate(one) if word not in own]
    assert np.mean(places) == pytest.approx(0.5, abs=0.05)
    plain = draws(PseudoQueries(LONG, {kind: 1}, noise=0), 0, 200)
    assert all(word in own for one in plain for word in one)
    prefixes = PseudoQueries(LONG, {"prefix": 1}, noise=8)
    assert all(set(one) <= own for one in draws(prefixes, 0, 50))


def test_kinds_are_drawn_by_weight_and_questions_where_there_are_some():
    asked = [{"query": "who?", "doc_ids": ["1"]}, {"query": "what?", "doc_ids": ["1", "2"]}]
    queries = PseudoQueries(LONG, parse_kinds("prefix:1,questions:3"), asked)
    found = Counter(" ".join(one) for one in draws(queries, 1, 2000))
    assert found["who?"] + found["what?"] == pytest.approx(1500, rel=0.05)
    assert all(len(one) == PREFIX_WORDS for one in draws(queries, 2, 50))  # the second gold one's is not its own
    only = PseudoQueries(LONG, {"questions": 1}, asked, noise=0)
    assert all(word.startswith("d2") for one in draws(only, 2, 50) for word in one)
    assert parse_kinds("spans, keywords:2") == {"spans": 1.0, "keywords": 2.0}
    for wrong in ("spans:x", "letters", "spans:-1", "spans:0", ""):
        with pytest.raises(UserError):
            PseudoQueries(LONG, parse_kinds(wrong))


def test_every_epoch_has_every_document_once_and_rehearsal_its_share():
    queries = PseudoQueries(LONG, {"prefix": 1})
    batches = PseudoQueryBatches(queries, range(5), 5, 64, seed=3)
    epochs = [batches.get(step).documents for step in range(6)]
    assert all(sorted(epoch) == ["0", "1", "2", "3", "4"] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    for pairs in map(batches.get, range(3)):
        assert all(query.startswith(f"d{id}w0 ") for query, id in zip(pairs.queries, pairs.documents, strict=True))
    drawn = PseudoQueryBatches(PseudoQueries(LONG, {"keywords": 1}), range(5), 6, 64)
    whole, parts = drawn.get(4), [drawn.get(4, range(2)), drawn.get(4, range(2, 6))]
    assert whole.queries == [query for part in parts for query in part.queries]  # whoever draws which rows
    assert drawn.get(4).queries == whole.queries != drawn.get(5).queries
    rehearsing = PseudoQueryBatches(queries, [4], 8, 64, rehearsed=[0, 1, 2, 3], rehearsal=0.75)
    found = Counter(id for step in range(4) for id in rehearsing.get(step).documents)
    assert found == {"4": 8, "0": 6, "1": 6, "2": 6, "3": 6}
