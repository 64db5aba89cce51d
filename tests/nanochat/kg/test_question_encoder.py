"""Texts as vectors of their words: what is padding, what is unknown, and a frozen model in place of learned words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanochat.kg.question_encoder import SentenceEncoder, WordEncoder, build_vocabulary, words


def test_words_and_vocabulary():
    assert words("Who directed film.actor.film, starred_actors?") == [
        "who", "directed", "film", "actor", "film", "starred", "actors"
    ]  # fmt: skip
    assert build_vocabulary(["b a", "b c"]) == ["b", "a", "c"]
    assert build_vocabulary(["b a", "b c"], min_count=2) == ["b"]


def test_vectors_of_a_text_are_those_it_has_alone():
    torch.manual_seed(0)
    encoder = WordEncoder(["who", "directed", "it"], 8).eval()
    texts = ["who directed it", "who", "", "nobody"]
    vectors, is_word, means = encoder(texts)
    assert is_word.sum(1).tolist() == [3, 1, 1, 1]
    for at, text in enumerate(texts):
        alone = encoder([text])
        assert torch.allclose(vectors[at][is_word[at]], alone[0][0], atol=1e-6)
        assert torch.allclose(means[at], alone[0][0].mean(0), atol=1e-6)
    assert torch.equal(encoder(["nobody"])[2], encoder(["somebody"])[2])  # both unknown
    assert not torch.allclose(encoder(["who directed it"])[2], encoder(["it directed who"])[2])


def test_unknown_words_are_learned_too():
    torch.manual_seed(0)
    encoder = WordEncoder(["who"], 8, forget=0.5).train()
    encoder(["who who who who who who who who"])[2].sum().backward()
    assert encoder.embedding.weight.grad[1].abs().sum() > 0


class Pieces:
    """In place of a sentence-transformers model: a random vector for each letter."""

    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=(128, 6))
        self.asked: list[str] = []

    def encode(self, texts, output_value, show_progress_bar):
        assert output_value == "token_embeddings"
        self.asked += texts
        return [torch.from_numpy(self.table[[ord(letter) for letter in text]]) for text in texts]


def test_a_frozen_model_reads_each_text_once():
    torch.manual_seed(0)
    pieces = Pieces()
    encoder = SentenceEncoder("none", 8, encoder=pieces)
    vectors, is_word, means = encoder(["abc", "x_y", "abc"])
    assert pieces.asked == ["a", "abc", "x y"]
    assert is_word.sum(1).tolist() == [3, 3, 3] and torch.equal(vectors[0], vectors[2])
    expected = encoder.project(torch.from_numpy(pieces.table[[97, 98, 99]]).float())
    assert torch.allclose(vectors[0], expected) and torch.allclose(means[0], expected.mean(0))
    encoder(["abc"])
    assert len(pieces.asked) == 3
    assert set(encoder.state_dict()) == {"project.weight", "project.bias"}


def test_a_model_of_sentence_transformers(tmp_path):
    """A tiny one with random weights: the real interface."""
    pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "directed", "it"])
    )
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    vectors, is_word, means = SentenceEncoder(str(tmp_path), 8)(["who directed it", "who"])
    assert vectors.shape == (2, 5, 8) and means.shape == (2, 8)
    assert is_word.sum(1).tolist() == [5, 3]
    assert not torch.allclose(vectors[0, 1], vectors[0, 2])
