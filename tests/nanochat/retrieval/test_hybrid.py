"""Two retrievers together, and a reranker after them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nanochat.common import UserError
from tests.nanochat.retrieval.samples import TinyEncoder, hits, make, random_documents


def test_hybrid_equals_the_formula():
    documents = random_documents(300)
    retriever = make("hybrid", alpha=0.3, candidates=20)
    retriever.add(documents)
    for query in ("baun", "beun caun", "cyun feun giun houn"):
        lists = [part.search([query], 20)[0] for part in (retriever.bm25, retriever.dense)]
        candidates = sorted({document.id for found in lists for document in found})
        bm25, dense = (part.score(query, candidates) for part in (retriever.bm25, retriever.dense))

        def scaled(scores):
            return [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]

        expected = dict(
            zip(candidates, [0.7 * s + 0.3 * d for s, d in zip(scaled(bm25), scaled(dense), strict=True)], strict=True)
        )
        found = retriever.search([query], 10)[0]
        assert len(found) == 10
        for document in found:
            assert document.score == pytest.approx(expected[document.id], abs=1e-12)
        assert found[-1].score >= sorted(expected.values())[-10] - 1e-12


def test_reciprocal_ranks_equal_the_formula():
    retriever = make("hybrid rrf", candidates=15)
    retriever.add(random_documents(200))
    expected = Counter()
    for part in (retriever.bm25, retriever.dense):
        for rank, document in enumerate(part.search(["beun caun"], 15)[0], 1):
            expected[document.id] += 1 / (60 + rank)
    found = retriever.search(["beun caun"], 15)[0]
    assert [document.score for document in found] == pytest.approx(sorted(expected.values())[::-1][:15])
    assert {document.id: document.score for document in found}.items() <= expected.items()


def test_hybrid_with_words_bm25_does_not_know_is_dense():
    retriever = make("hybrid")
    retriever.add(random_documents(50))
    found, dense = (part.search(["zzz"], 5)[0] for part in (retriever, retriever.dense))
    assert [document.id for document in found] == [document.id for document in dense]


def test_alpha_weighs_dense_and_queries_are_encoded_once():
    documents = random_documents(80)
    encoder = TinyEncoder()
    for alpha, part in ((0.0, "bm25"), (1.0, "dense")):
        retriever = make("hybrid", alpha=alpha, encoder=encoder)
        retriever.add(documents)
        encoder.encoded = 0
        found = retriever.search(["beun caun"], 5)[0]
        assert encoder.encoded == 1
        expected = getattr(retriever, part).search(["beun caun"], 5)[0]
        assert [document.id for document in found] == [document.id for document in expected]


def test_a_document_says_where_each_part_had_it():
    retriever = make("hybrid", candidates=10)
    retriever.add(random_documents(200))
    query = "beun caun"
    for document in retriever.search([query], 8, explain=True)[0]:
        for part in retriever.parts:
            ranks = {d.id: rank for rank, d in enumerate(part.search([query], 10)[0], 1)}
            found = document.explanation[part.type]
            assert found.get("rank") == ranks.get(document.id)
            assert found["score"] == pytest.approx(part.score(query, [document.id])[0])
        assert document.to_dict()["explanation"] == document.explanation
    assert not retriever.search([query], 1)[0][0].explanation
    alone = retriever.bm25.search([query], 2, explain=True)[0]
    assert [d.explanation for d in alone] == [{"bm25": {"rank": n, "score": d.score}} for n, d in enumerate(alone, 1)]


class Backwards:
    """Likes best what hybrid likes least."""

    def __init__(self):
        self.read: list[list[str]] = []

    def score(self, query, documents):
        self.read.append([document.id for document in documents])
        return np.arange(len(documents))


def test_a_reranker_orders_the_best_anew():
    plain, reranker = make("hybrid"), Backwards()
    reranked = make("hybrid", reranker=reranker, rerank_candidates=6)
    for retriever in (plain, reranked):
        retriever.add(random_documents(100))
    best = [document.id for document in plain.search(["beun caun"], 6)[0]]
    assert [id for id, _ in hits(reranked, ["beun caun"], 3)[0]] == best[::-1][:3]
    assert reranker.read == [best]
    assert hits(reranked, ["beun caun"], 3)[0][0][1] == 5.0


def test_a_cross_encoder_made_here(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "baun", "beun", "caun", "dyun"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=9, num_labels=1, **shape)).save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    retriever = make("hybrid", rerank=str(tmp_path), rerank_candidates=10)
    retriever.add(random_documents(30))
    found = retriever.search(["baun caun"], 10)[0]
    model = sentence_transformers.CrossEncoder(str(tmp_path))
    texts = [("baun caun", f"{document.title}\n{document.content}") for document in found]
    np.testing.assert_allclose([d.score for d in found], model.predict(texts, show_progress_bar=False), atol=1e-5)
    assert retriever.settings()["rerank"] == str(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        broken = make("hybrid", rerank=str(tmp_path / "nothing"))
        broken.add(random_documents(3))
        broken.search(["baun"])


@pytest.mark.parametrize("settings", [{"alpha": 2}, {"fusion": "sum"}, {"candidates": 0}])
def test_bad_hybrid_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        make("hybrid", **settings)
