"""Questions and names of relations as vectors: words learned here, or a frozen model of sentence-transformers.

Both give a vector for each word, for a retriever that looks at one part of the
question after the other, and their mean.

    T texts, L words of the longest, D width
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.kg.subgraphs import TOPIC

WORDS = "words"  # the encoder that is learned here; any other name is a model of sentence-transformers
_WORD = re.compile(r"[^\W_]+")  # starred_actors and film.actor.film are words with something between them
_PADDING, _UNKNOWN = 0, 1


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def build_vocabulary(texts: Iterable[str], min_count: int = 1) -> list[str]:
    """Words that stand at least so often in these texts, frequent ones first."""
    counts = Counter(word for text in texts for word in words(text))
    return sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )


class WordEncoder(nn.Module):
    """A vector for each known word and a GRU over them in both directions. In training, words are unknown now and
    then, so that the retriever has seen what it does with one that is."""

    def __init__(self, vocabulary: Sequence[str], width: int, forget: float = 0.05):
        super().__init__()
        self.ids = {word: number for number, word in enumerate(vocabulary, _UNKNOWN + 1)}
        self.forget = forget
        self.embedding = nn.Embedding(len(self.ids) + 2, width, padding_idx=_PADDING)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """vectors (T, L, D), is_word (T, L) and their mean (T, D)."""
        rows = [[self.ids.get(word, _UNKNOWN) for word in words(text)] or [_UNKNOWN] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
        tokens = tokens.to(self.embedding.weight.device)
        is_word = tokens != _PADDING
        if self.training:
            forgotten = torch.rand(tokens.shape, device=tokens.device) < self.forget
            tokens = tokens.masked_fill(forgotten & is_word, _UNKNOWN)
        vectors = self.embedding(tokens)
        packed = nn.utils.rnn.pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        read, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        vectors = vectors + read  # a relation's name is three words: they should be found in the question as they are
        return vectors, is_word, _mean(vectors, is_word)


class SentenceEncoder(nn.Module):
    """Vectors of a frozen model's word pieces, each text once, brought to width D by a matrix that is learned."""

    def __init__(self, model: str, width: int, encoder: Any = None):
        """encoder: in place of the model, an object with encode(texts, output_value="token_embeddings")."""
        super().__init__()
        if encoder is None:
            from nanochat.retrieval.dense import load_model

            advice = f"the encoder {WORDS!r}, which is learned"
            encoder = load_model("SentenceTransformer", model, None, "reads the questions", advice)
        self._encoder = [encoder]  # in a list: it is frozen and no part of what is trained and saved
        self._known: dict[str, Tensor] = {}
        self.project = nn.Linear(len(self._pieces(["a"])[0][0]), width)

    def _pieces(self, texts: list[str]) -> list[Tensor]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            shown = [text.replace(TOPIC, "this").replace("_", " ") for text in new]
            found = self._encoder[0].encode(shown, output_value="token_embeddings", show_progress_bar=False)
            self._known.update({text: pieces.detach().float().cpu() for text, pieces in zip(new, found, strict=True)})
        return [self._known[text] for text in texts]

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """vectors (T, L, D), is_word (T, L) and their mean (T, D)."""
        pieces = self._pieces(list(texts))
        is_word = torch.arange(max(map(len, pieces))) < torch.tensor([len(row) for row in pieces])[:, None]
        padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(self.project.weight.device)
        is_word = is_word.to(padded.device)
        vectors = self.project(padded)
        return vectors, is_word, _mean(vectors, is_word)


def _mean(vectors: Tensor, is_word: Tensor) -> Tensor:
    weight = is_word.unsqueeze(-1).to(vectors.dtype)
    return (vectors * weight).sum(1) / weight.sum(1)
